"""Mamba-2's kernels against PyTorch in float64 and against transformers, in every tier that this machine has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_native import SMALL, tiers
from torch.nn.functional import softplus
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHRMSNormGated,
    causal_conv1d_fn,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from palaestra.kernels import mamba, mamba_native
from palaestra.kernels.mamba import Mixer, Slots, recur, step, step_plain, stochastic_round
from palaestra.kernels.native import FILE, Library, library
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid

SCAN = ("x", "dt", "a", "b", "c", "d", "state")
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def settled():
    """Everything as it was: the tier, the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    Library(FILE, None)


def scan_inputs(batch=2, length=70, heads=4, dim=16, groups=2, state=32, fast=1.0, seed=0):
    """x, dt, a, b, c, d and a first state; x, b and c are views of wider rows, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    inner, shared = heads * dim, groups * state
    rows = torch.randn(batch, length, inner + 2 * shared + 16, generator=generator)
    x, b, c, _ = rows.split([inner, shared, shared, 16], dim=-1)
    dt = fast * softplus(torch.randn(batch, length, heads, generator=generator))
    first = torch.randn(batch, heads, dim, state, generator=generator)
    d = torch.randn(heads, generator=generator)
    a = -torch.arange(1.0, heads + 1)
    b, c = (part.unflatten(-1, (groups, state)) for part in (b, c))
    return [x.unflatten(-1, (heads, dim)), dt, a, b, c, d, first]


def starting(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator) < 0.1


def with_gradients(function, inputs, *others):
    """What a function gives, and the gradients of its inputs for gradients that depend on the shapes alone."""
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(9)
    flows = [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in outputs]
    torch.autograd.backward(outputs, flows)
    return [tensor.detach() for tensor in outputs], [None if tensor is None else tensor.grad for tensor in inputs]


def close(found, expected, most=1e-5, floor=1e-6):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= most * expected.norm() + floor


def in_double(inputs):
    return [None if tensor is None else tensor.double() for tensor in inputs]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 200),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (4, 4)]),
    dim=st.sampled_from([16, 48]),
    state=st.sampled_from([16, 32, 64]),
    fast=st.sampled_from([0.01, 1.0, 30.0]),
    packed=st.booleans(),
    fresh=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_the_scan_and_its_gradients_are_those_of_float64(
    batch, length, heads, dim, state, fast, packed, fresh, threads, seed
):
    inputs = scan_inputs(batch, length, heads[0], dim, heads[1], state, fast, seed)
    inputs[-1] = None if fresh else inputs[-1]
    starts = starting(batch, length, seed) if packed else None
    expected = with_gradients(mamba.scan_plain, in_double(inputs), starts)
    whole = 1e-6 * (batch * dim * state) ** 0.5  # sums over a state or over all tokens may cancel
    floors = {"dt": whole, "a": 10 * whole * length * max(1, fast), "d": whole * length}
    torch.set_num_threads(threads)
    for name in tiers():
        Library(FILE, name)
        found = with_gradients(mamba.scan, inputs, starts)
        for ours, theirs in zip(found[0], expected[0], strict=True):
            close(ours, theirs)
        for which, ours, theirs in zip(SCAN, found[1], expected[1], strict=True):
            if theirs is not None:
                close(ours, theirs, 1e-5, floors.get(which, 1e-6))


def test_long_sequences_lose_no_digits():
    inputs = scan_inputs(1, 2000, 4, 16, 1, 16)
    expected, found = (with_gradients(mamba.scan, given) for given in (in_double(inputs), inputs))
    for ours, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        close(ours, theirs, 1e-4 if ours.shape == inputs[2].shape else 1e-5)  # sums over all tokens cancel


def test_the_plain_versions_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    inputs = [tensor.double().requires_grad_() for tensor in scan_inputs(2, 7, 4, 3, 2, 5)]
    starts = torch.tensor([[1, 0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()
    for marks in (None, starts):
        assert torch.autograd.gradcheck(
            lambda *given, marks=marks: mamba.scan_plain(*given, marks, 3), inputs, fast_mode=True
        )
    sizes = ((2, 7, 6), (6, 4), (6,))
    inputs = [torch.randn(size, dtype=torch.double, generator=generator).requires_grad_() for size in sizes]
    for marks in (None, starts):
        assert torch.autograd.gradcheck(lambda *given, marks=marks: mamba.convolve_plain(*given, marks), inputs)
    sizes = ((2, 3, 8), (2, 3, 8), (8,))
    inputs = [torch.randn(size, dtype=torch.double, generator=generator).requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(lambda *given: mamba.gated_norm_plain(*given, 2, 1e-5), inputs)


def test_several_sequences_in_a_row_are_what_each_is_alone():
    x, dt, a, b, c, d, first = scan_inputs(1, 90)
    starts = torch.zeros(1, 90, dtype=torch.bool)
    starts[0, [20, 21, 85]] = True
    for of in (mamba.scan, mamba.scan_plain):
        y, last = of(x, dt, a, b, c, d, first, starts)
        for begin, end in ((0, 20), (20, 21), (21, 85), (85, 90)):
            part = slice(begin, end)
            state = first if begin == 0 else None
            alone, left = of(x[:, part], dt[:, part], a, b[:, part], c[:, part], d, state)
            close(y[:, part], alone)
        close(last, left)
    rows, weight, bias = torch.randn(1, 90, 32), torch.randn(32, 4), torch.randn(32)
    for of in (mamba.convolve, mamba.convolve_plain):
        y = of(rows, weight, bias, starts)
        for begin, end in ((0, 20), (20, 21), (21, 85), (85, 90)):
            close(y[:, begin:end], of(rows[:, begin:end], weight, bias))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    parts=st.integers(1, 20),
    kernel=st.integers(1, 6),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_convolution_gate_and_norm_are_those_of_float64(batch, length, parts, kernel, packed, seed):
    generator = torch.Generator().manual_seed(seed)
    width = 16 * parts
    rows = torch.randn(batch, length, 2 * width, generator=generator)
    weight, bias = torch.randn(width, kernel, generator=generator), torch.randn(width, generator=generator)
    starts = starting(batch, length, seed) if packed else None
    x, z = rows.split(width, dim=-1)
    norm = bias + 2
    cases = (
        (mamba.convolve, [x, weight, bias], (starts,)),
        (mamba.gated_norm, [x, z, norm], (parts if parts < 3 else 1, 1e-5)),
    )
    for function, inputs, others in cases:
        expected = with_gradients(function, in_double(inputs), *others)
        for name in tiers():
            Library(FILE, name)
            found = with_gradients(function, inputs, *others)
            for ours, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
                close(ours, theirs)


@pytest.mark.parametrize("name", tiers())
def test_no_number_depends_on_threads_nor_on_the_other_rows(name):
    Library(FILE, name)
    inputs, starts = scan_inputs(5, 80, 4, 16, 1, 32), starting(5, 80)
    rows, weight, norm = torch.randn(5, 80, 64), torch.randn(64, 4), torch.randn(64)
    cases = (
        (mamba.scan, inputs, (0, 1, 3, 4, 6), (starts,)),
        (mamba.convolve, [rows, weight, norm], (0,), (starts,)),
        (mamba.gated_norm, [rows, rows.flip(-1), norm], (0, 1), (2, 1e-5)),
    )
    for function, inputs, batched, others in cases:
        torch.set_num_threads(1)
        one = with_gradients(function, inputs, *others)
        torch.set_num_threads(3)
        three = with_gradients(function, inputs, *others)
        for left, right in zip([*one[0], *one[1]], [*three[0], *three[1]], strict=True):
            assert torch.equal(left, right)
        alone = [tensor[:1] if place in batched else tensor for place, tensor in enumerate(inputs)]
        outputs = function(*alone, *(other[:1] if other is starts else other for other in others))
        for left, right in zip(outputs if isinstance(outputs, tuple) else (outputs,), one[0], strict=True):
            assert torch.equal(left, right[:1])


def test_every_output_is_written():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        rows, weight = torch.randn(3, 70, 160), torch.randn(160, 4)
        for function, inputs, others in (
            (mamba.scan, scan_inputs(3, 70), (starting(3, 70),)),
            (mamba.convolve, [rows, weight, weight[:, 0]], (None,)),
            (mamba.gated_norm, [rows, rows.clone(), weight[:, 0]], (2, 1e-5)),
        ):
            outputs, gradients = with_gradients(function, inputs, *others)
            assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
    finally:
        torch.use_deterministic_algorithms(before)


def test_nothing_is_written_beyond_the_outputs():
    inputs = scan_inputs(1, 3)
    y, last = torch.full((1, 4, 4, 16), torch.nan), torch.full((2, 4, 16, 32), torch.nan)
    record, _kept = mamba_native._scan_record((*inputs, None), {"y": y, "last": last})
    library().scan_forward(record, 2)
    assert y[:, :3].isfinite().all()
    assert last[0].isfinite().all()
    assert y[:, 3].isnan().all()
    assert last[1].isnan().all()


def test_the_operations_are_registered_as_torch_wants_them():
    inputs = [tensor.contiguous().requires_grad_() for tensor in scan_inputs(2, 5)]
    torch.library.opcheck(mamba_native.scan, (*inputs, starting(2, 5)))
    torch.library.opcheck(mamba_native.scan, (*inputs[:-1], None, None))
    rows, weight = torch.randn(2, 5, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    torch.library.opcheck(mamba_native.convolve, (rows, weight, bias, starting(2, 5)))
    torch.library.opcheck(mamba_native.gated_norm, (rows, torch.randn(2, 5, 32), bias, 2, 1e-5))


def test_the_scan_is_that_of_transformers():
    x, dt, a, b, c, d, first = scan_inputs(2, 150, 8, 16, 2, 32, fast=0.1)
    more = {"D": d, "initial_states": first, "return_final_states": True}
    expected = mamba2_chunk_scan(x, dt, a, b, c, 64, **more)
    for ours, theirs in zip(mamba.scan(x, dt, a, b, c, d, first), expected, strict=True):
        close(ours, theirs)
    rows, weight, bias = torch.randn(2, 30, 64), torch.randn(64, 4), torch.randn(64)
    expected = causal_conv1d_fn(rows.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    close(mamba.convolve(rows, weight, bias), expected)
    norm = NemotronHRMSNormGated(64, group_size=16, eps=1e-5)
    norm.weight.data = bias
    close(mamba.gated_norm(rows, rows.flip(0), bias, 4, 1e-5), norm(rows, rows.flip(0)).detach())


def test_what_the_c_does_not_take_is_plain():
    narrow = scan_inputs(1, 9, 4, 8, 2, 32)
    for ours, theirs in zip(mamba.scan(*narrow), mamba.scan_plain(*narrow), strict=True):
        assert torch.equal(ours, theirs)
    assert mamba.scan(*in_double(narrow))[0].dtype == torch.double
    assert mamba.scan(*(tensor.to("meta") for tensor in scan_inputs()))[0].shape == (2, 70, 4, 16)


def test_a_models_gradients_are_those_of_torch(monkeypatch):
    torch.manual_seed(0)
    model = Hybrid(ModelConfig(**SMALL, hybrid_override_pattern="MM", n_groups=2))
    ids, lengths = torch.randint(56, (3, 20)), torch.tensor([20, 7, 13])
    seen, weights = (torch.arange(20) < lengths[:, None])[..., None], torch.randn(3, 20, 32)

    def gradients():
        model.zero_grad()
        (model.hidden(ids, lengths) * seen * weights).sum().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    found = gradients()
    monkeypatch.setattr(mamba, "library", lambda: None)
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-4)


def mixer(groups=2, kernel=4, **others):
    torch.manual_seed(5)
    heads, dim, state = 4, 32, 48
    width = heads * dim + 2 * groups * state
    return Mixer(
        conv=torch.randn(kernel, width),
        conv_bias=torch.randn(width),
        dt_bias=torch.randn(heads),
        a=-torch.arange(1.0, heads + 1),
        d=torch.randn(heads),
        norm=torch.randn(heads * dim),
        groups=groups,
        **others,
    )


def doubled(of):
    """A record of tensors, in float64."""
    values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return type(of)(**{name: v.double() if isinstance(v, torch.Tensor) else v for name, v in values.items()})


@pytest.mark.parametrize("name", tiers())
@pytest.mark.parametrize(("groups", "kernel"), [(1, 4), (2, 1), (4, 6)])
def test_a_step_is_that_of_float64(name, groups, kernel):
    Library(FILE, name)
    of = mixer(groups, kernel, dt_min=0.01)
    slots, rows = Slots.empty(of, 6), torch.tensor([5, 0, 3])
    exact = doubled(slots)
    for turn in range(12):
        torch.set_num_threads(1 + turn % 3)
        parts = torch.randn(3, len(of.norm) + len(of.conv_bias) + of.heads)
        close(step(of, parts, slots, rows), step_plain(doubled(of), parts.double(), exact, rows))
    close(slots.states, exact.states)
    close(slots.windows, exact.windows)
    assert not slots.states[[1, 2, 4]].any()
    assert not slots.windows[[1, 2, 4]].any()
    with pytest.raises(IndexError, match=r"rows from 0 to 5; got \[6\]"):
        step(of, parts[:1], slots, torch.tensor([6]))


def test_a_steps_recurrence_is_that_of_transformers():
    x, dt, a, b, c, d, first = scan_inputs(3, 1, 8, 16, 2, 32)
    wide, ours, theirs = (8, 16, 32), first.clone(), first.clone()
    expected = mamba2_selective_state_update(
        theirs, x[:, 0], dt[:, 0, :, None].expand(3, 8, 16), a[:, None, None].expand(wide), b[:, 0], c[:, 0], d[:, None]
    )
    close(recur(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], ours) + d[:, None] * x[:, 0], expected)
    close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
@pytest.mark.parametrize("name", tiers())
def test_a_conversations_step_is_the_same_alone_and_in_any_company(name, dtype):
    Library(FILE, name)
    of = mixer()
    together, alone = Slots.empty(of, 4, dtype), Slots.empty(of, 4, dtype)
    parts = torch.randn(4, len(of.norm) + len(of.conv_bias) + of.heads)
    for seed in range(3):
        torch.set_num_threads(3)
        y = step(of, parts, together, torch.arange(4), seed)
        torch.set_num_threads(1)
        for row in (2, 0, 3, 1):
            assert torch.equal(step(of, parts[row : row + 1], alone, torch.tensor([row]), seed)[0], y[row])
    assert torch.equal(together.states, alone.states)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_steps_with_states_of_16_bits_are_near_those_of_float64(dtype):
    of = mixer()
    exact, rows = doubled(Slots.empty(of, 8)), torch.arange(8)
    kept = {name: Slots.empty(of, 8, dtype) for name in (*tiers(), "plain")}
    for turn in range(20):
        parts = torch.randn(8, len(of.norm) + len(of.conv_bias) + of.heads)
        expected = step_plain(doubled(of), parts.double(), exact, rows)
        for name, slots in kept.items():
            if name == "plain":
                close(step_plain(of, parts, slots, rows, turn), expected, 1e-2)
                continue
            Library(FILE, name)
            close(step(of, parts, slots, rows, turn), expected, 1e-2)
    assert all(slots.states.dtype == dtype for slots in kept.values())


def roundings(dtype, scale, seeds, name):
    """Of states that a step only makes decay, by tokens whose x is 0: what they should be, and what each seed gives."""
    Library(FILE, name)
    of = dataclasses.replace(
        mixer(kernel=1), conv_bias=torch.zeros(len(mixer().conv_bias)), dt_bias=torch.full((4,), -3.0)
    )
    parts, rows = torch.zeros(2, len(of.norm) + len(of.conv_bias) + of.heads), torch.tensor([1, 0])
    before = (torch.randn(2, 4, 32, 48) * scale).to(dtype)
    exact = before.double() * torch.exp(softplus(of.dt_bias) * of.a).double()[:, None, None]
    found = []
    for seed in range(seeds):
        slots = Slots.empty(of, 2, dtype)
        slots.states.copy_(before)
        step(of, parts, slots, rows, seed)
        found.append(slots.states.double())
    return exact, torch.stack(found)


@pytest.mark.parametrize("scale", [1.0, 1e-5])  # 1e-5: most of float16's are subnormal
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", tiers())
def test_stochastic_rounding_has_no_bias(name, dtype, scale):
    exact, found = roundings(dtype, scale, 200, name)
    generator = torch.Generator().manual_seed(1)
    plain = torch.stack([stochastic_round(exact.float(), dtype, generator).double() for _ in range(200)])
    digits, least = mamba.ROUNDED[dtype]
    unit = torch.ldexp(torch.ones_like(exact), (torch.frexp(exact).exponent - digits).clamp(min=least))
    for values in (found, plain):
        off = (values - exact) / unit
        assert off.abs().max() < 1.01
        assert off.abs().mean() > 0.2  # it does round both ways
        assert abs(off.mean()) < 5 * 0.5 / off.numel() ** 0.5 + 1e-4
        up = exact / unit - (exact / unit).floor()
        deviations = (off.sum(0) / (200 * up * (1 - up)).clamp(min=4).sqrt()).flatten()
        assert 0.9 < deviations.square().mean() < 1.1  # of each entry over the seeds: as chance has it
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_seed_gives_the_same_rounding_again(dtype):
    of = mixer()
    parts = torch.randn(2, len(of.norm) + len(of.conv_bias) + of.heads)
    states = []
    for seed in (7, 7, 8):
        slots = Slots.empty(of, 2, dtype)
        step(of, parts, slots, torch.tensor([1, 0]), seed)
        states.append(slots.states)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_float16_state_stays_finite():
    of = mixer()
    slots = Slots.empty(of, 1, torch.float16)
    parts = torch.full((1, len(of.norm) + len(of.conv_bias) + of.heads), 300.0)
    for seed in range(5):
        assert step(of, parts, slots, torch.tensor([0]), seed).isfinite().all()
    assert slots.states.isfinite().all()
    assert slots.states.abs().max() == 65504


def test_other_states_are_refused():
    with pytest.raises(ValueError, match=r"states are kept in torch\.float32, .*; got torch\.float64"):
        Slots.empty(mixer(), 1, torch.float64)


def test_other_default_dtypes_and_shapes_change_nothing_or_are_refused():
    y, z, weight = torch.randn(5, 64), torch.randn(5, 80)[:, 8:72], torch.randn(64)
    torch.testing.assert_close(mamba.gated_norm(y, z, weight, 2, 1e-5), mamba.gated_norm_plain(y, z, weight, 2, 1e-5))
    with pytest.raises(ValueError, match="3 groups do not divide a width of 64"):
        mamba.gated_norm(y, z, weight, 3, 1e-5)
    x, dt, a, b = torch.randn(1, 4, 3, 16), torch.rand(1, 4, 3), -torch.rand(3), torch.randn(1, 4, 1, 16)
    expected = mamba.scan(x, dt, a, b, b, torch.ones(3))[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(mamba.scan(x, dt, a, b, b, torch.ones(3, dtype=torch.float32))[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="as many heads for every group"):
        mamba.scan(x, dt, a, b.expand(1, 4, 2, 16), b.expand(1, 4, 2, 16), torch.ones(3))
    with pytest.raises(ValueError, match="a token at least"):
        mamba.scan(x[:, :0], dt[:, :0], a, b[:, :0], b[:, :0], torch.ones(3))
