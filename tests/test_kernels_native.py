"""The C kernels against PyTorch in float64, in every tier that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palaestra.kernels import fp8, native, nvfp4
from palaestra.kernels.linear import Weight, linear, linear_plain, pack
from palaestra.kernels.native import FILE, TILE, Library, Matrix, library
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.decoder import Decoder, decoder, fits
from palaestra.model.network import Hybrid

KINDS = {
    "nvfp4": nvfp4.quantize,
    "fp8": fp8.quantize,
    "float32": lambda weight: weight,
    "bf16": lambda weight: weight.bfloat16(),
}
INT8 = "nvfp4, int8 activations"
EPS = 2.0**-24
MARGIN = 68
"""Bytes, or entries, around what a kernel may touch: a multiple of 4 but not of 8, so that no vector is aligned."""
SMALL = {
    "vocab_size": 56,
    "hidden_size": 32,
    "head_dim": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "intermediate_size": 64,
}
CONFIGS = {
    "latent": {"hybrid_override_pattern": "ME*E", "moe_latent_size": 16},
    "plain experts, router groups": {
        "hybrid_override_pattern": "EM",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": False,
    },
    "Mamba groups, wide kernel, clamp": {
        "hybrid_override_pattern": "MM-",
        "n_groups": 2,
        "conv_kernel": 6,
        "hf_dt_clamp": True,
    },
    "one key and value head": {"hybrid_override_pattern": "*-*", "num_key_value_heads": 1},
}


def tiers() -> list[str]:
    """Those of this machine, the best first."""
    found = []
    for name in ("avx512bf16", "avx512", "avx2", "portable"):
        try:
            Library(FILE, name)
        except ValueError:
            continue
        found.append(name)
    return found


@pytest.fixture(params=tiers())
def tier(request):
    yield Library(FILE, request.param)
    Library(FILE, None)


def test_the_library_was_built_and_takes_the_best_tier():
    found = library()
    assert found is not None
    assert found.tier == tiers()[0]
    assert "portable" in tiers()


def values_of(weight: Weight) -> torch.Tensor:
    """float64[N, K]."""
    if isinstance(weight, nvfp4.NVFP4):
        return nvfp4.dequantize(weight).double()
    return (fp8.dequantize(weight) if isinstance(weight, fp8.FP8) else weight).double()


PRODUCTS = {
    "rows": st.integers(1, 70),
    "blocks": st.integers(1, 40),
    "batch": st.integers(1, 20),
    "kind": st.sampled_from([*sorted(KINDS), INT8]),
    "threads": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
}
"""Of weights [rows, 16 blocks] with activations [batch, 16 blocks]; of the kind INT8 those of NVFP4 with int8 ones."""


@settings(max_examples=60, deadline=None)
@given(**PRODUCTS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_products_are_those_of_float64_and_of_every_tier(rows, blocks, batch, kind, threads, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = KINDS.get(kind, nvfp4.quantize)(torch.randn(rows, 16 * blocks, generator=generator))
    x = torch.randn(batch, 16 * blocks, generator=generator).to(dtype)
    expected = x.double() @ values_of(weight).T
    terms = x.double().abs() @ values_of(weight).abs().T
    found = {}
    for name in tiers():
        of = Library(FILE, name)
        found[name] = linear(of, x, pack(of, weight), threads, int8=kind == INT8)
        assert found[name].dtype == torch.float32
        if kind != INT8:
            assert (found[name] - expected).norm() <= 1e-5 * expected.norm()
        elif rows * batch >= 100:
            assert (found[name] - expected).norm() <= 1e-2 * expected.norm()
    for one, other in combinations(found.values(), 2):
        assert ((one - other).abs() <= 2 * EPS * (16 * blocks + 4) * terms).all()


HELPERS = """
import os, sys, torch
from palaestra.kernels import nvfp4
from palaestra.kernels.linear import linear, pack
from palaestra.kernels.native import library

def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}

def helpers():
    before = tasks()
    assert torch.equal(linear(found, x, weight, threads=2), wanted)
    return before, tasks()

two = set(sorted(os.sched_getaffinity(0))[:2])
os.sched_setaffinity(0, two)
found, x = library(), torch.ones(2, 512)
weight = pack(found, nvfp4.quantize(torch.randn(512, 512)))
wanted = linear(found, x, weight)
before, after = helpers()
(helper,) = after - before
assert len(os.sched_getaffinity(helper)) == 1 and os.sched_getaffinity(helper) < two
one = os.sched_getaffinity(helper)
os.sched_setaffinity(0, one)
helpers()
assert os.sched_getaffinity(helper) == one
os.sched_setaffinity(0, two)
helpers()
assert len(os.sched_getaffinity(helper)) == 1
if not (child := os.fork()):
    before, after = helpers()
    assert len(after - before) == 1 and os.sched_getaffinity((after - before).pop()) < two
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_helpers_keep_off_their_callers_core_while_it_has_another_and_after_a_fork_too():
    command = [sys.executable, "-P", "-c", HELPERS]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**31))
@example(rows=4100, blocks=17, batch=1, seed=0).via("more codes than count as near")
@example(rows=40, blocks=40, batch=9, seed=0).via("converted on threads, on the heap")
def test_products_with_int8_activations_are_within_their_rounding(rows, blocks, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = nvfp4.quantize(torch.randn(rows, 16 * blocks, generator=generator))
    x = torch.randn(batch, 16 * blocks, generator=generator)
    steps = torch.cat([(part.abs().amax(-1, keepdim=True) / 127).expand_as(part) for part in x.split(64, -1)], -1)
    bound = steps @ nvfp4.dequantize(weight).abs().T * 0.501 + 1e-6
    for name in tiers():
        of = Library(FILE, name)
        found = linear(of, x, pack(of, weight), threads=2, int8=True)
        assert ((found - linear_plain(x, weight)).abs() <= bound).all()


def amid_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an odd address, among bytes that are NaN in every format."""
    room = torch.full((tensor.nbytes + 2 * MARGIN,), 255, dtype=torch.uint8)
    found = room[MARGIN:-MARGIN].view(tensor.dtype).view(tensor.shape)
    return found.copy_(tensor)


@settings(max_examples=60, deadline=None)
@given(**PRODUCTS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_output_is_written_and_nothing_around_it_is_read_or_written(
    rows, blocks, batch, kind, threads, seed, dtype
):
    generator = torch.Generator().manual_seed(seed)
    weight = KINDS.get(kind, nvfp4.quantize)(torch.randn(rows, 16 * blocks, generator=generator))
    x = torch.randn(batch, 16 * blocks, generator=generator).to(torch.float32 if kind == INT8 else dtype)
    activations = native.INT8 if kind == INT8 else native.KINDS[x.dtype]
    for name in tiers():
        of = Library(FILE, name)
        packed = pack(of, weight)
        record = Matrix.from_buffer_copy(packed.record)
        among = [amid_nan(tensor) for tensor in (*packed.tensors, x)]
        record.data = among[0].data_ptr()
        record.scales = among[1].data_ptr() if record.scales else None
        y = torch.full((MARGIN + batch * TILE * record.tiles + MARGIN,), torch.nan)
        assert not of.multiply(record, among[-1].data_ptr(), activations, batch, y[MARGIN:].data_ptr(), threads)
        assert y[:MARGIN].isnan().all()
        assert y[-MARGIN:].isnan().all()
        written = y[MARGIN:-MARGIN].view(batch, -1)
        assert torch.equal(written[:, :rows], linear(of, x, packed, int8=kind == INT8))
        assert not written[:, rows:].any()


def test_activations_too_small_for_bytes_count_as_zeros_and_negative_scales_are_refused(tier):
    weight = nvfp4.quantize(torch.randn(20, 32))
    assert not linear(tier, torch.full((1, 32), 1e-38), pack(tier, weight), int8=True).any()
    with pytest.raises(ValueError, match="20x32 has negative block scales"):
        pack(tier, weight._replace(scales=(-weight.scales.float()).to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_in_its_row(tier, kind):
    packed = pack(tier, KINDS[kind](torch.randn(20, 528)))
    x = torch.randn(15, 528)
    clean = linear(tier, x, packed)
    x[4, 77], x[9, 0] = torch.nan, torch.inf
    found = linear(tier, x, packed)
    others = [row for row in range(15) if row not in (4, 9)]
    assert torch.equal(found[others], clean[others])
    assert found[4].isnan().all()
    assert not found[9].isfinite().any()
    if kind == "nvfp4":
        found, clean = (linear(tier, values, packed, int8=True) for values in (x, torch.where(x.isfinite(), x, 0)))
        assert torch.equal(found[others], clean[others])
        assert not found[[4, 9]].isfinite().any()


def every_value(kind: str) -> Weight:
    """A weight [N, 16] in which every value of the format stands, subnormal ones included, infinities and NaN not."""
    if kind == "nvfp4":
        codes = torch.arange(16, dtype=torch.uint8)
        scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
        return nvfp4.NVFP4((codes[0::2] | codes[1::2] << 4).repeat(127, 1), scales, torch.tensor(0.25))
    bytes_ = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        codes = bytes_.masked_fill(bytes_ & 127 == 127, 0).view(torch.float8_e4m3fn)
        return fp8.FP8(codes.view(16, 16), torch.tensor(0.3))
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values.masked_fill(~values.isfinite(), 0).view(-1, 16)
    return values if kind == "bf16" else values.float() * (1 + 2.0**-20)


@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_format_is_met_exactly(tier, kind, together):
    weight = every_value(kind)
    packed = pack(tier, weight)
    found = torch.cat([linear(tier, x, packed) for x in torch.eye(16).split(together)])
    assert torch.equal(found.T.double(), values_of(weight))


def test_a_row_is_the_same_number_whatever_stands_beside_it_and_however_many_threads(tier):
    for kind, make in KINDS.items():
        packed = pack(tier, make(torch.randn(40, 1040)))  # more columns than are unpacked at once
        x = torch.randn(27, 1040)
        together = linear(tier, x, packed, threads=2)
        for count in range(1, 14):
            assert torch.equal(linear(tier, x[:count], packed), together[:count]), kind
    packed = pack(tier, nvfp4.quantize(torch.randn(40, 1040)))
    for x, int8 in ((torch.randn(27, 1040), True), (torch.randn(27, 1040).bfloat16(), False)):
        together = linear(tier, x, packed, threads=2, int8=int8)
        for count in range(1, 14):
            assert torch.equal(linear(tier, x[:count], packed, int8=int8), together[:count])


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    count=st.integers(1, 12),
    threads=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1.0, 9.0]),
    seed=st.integers(0, 2**31),
)
def test_draws_are_those_of_float64_in_every_tier(width, count, threads, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((count, width + 3), torch.nan)  # rows may lie further apart than they are wide
    logits[:, :width] = torch.randn(count, width, generator=generator) * spread
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    temperatures = torch.linspace(0.5, 1.5, count)
    exact = (logits[:, :width].double() / temperatures.double()[:, None]).log_softmax(-1)
    beyond = exact.exp().cumsum(-1)
    for name in tiers():
        ids, logprobs = torch.full((count + 1,), -1), torch.full((count + 1,), torch.nan)
        given_ = (tensor.data_ptr() for tensor in (temperatures, uniform, ids, logprobs))
        assert Library(FILE, name).draw(logits.data_ptr(), width + 3, width, count, *given_, threads) == 0
        assert ids[-1] == -1
        assert logprobs[-1].isnan()
        at = ids[:-1, None]
        torch.testing.assert_close(logprobs[:-1].double(), exact.gather(1, at)[:, 0], rtol=1e-5, atol=1e-5)
        upper = beyond.gather(1, at)[:, 0]
        lower = upper - exact.gather(1, at)[:, 0].exp()
        assert ((lower - 1e-5 <= uniform) & (uniform <= upper + 1e-5)).all()


def test_what_does_not_fit_is_refused():
    found = library()
    with pytest.raises(ValueError, match=r"NVFP4, FP8, float32 or bf16; got torch\.int64"):
        pack(found, torch.zeros(16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="32 columns, and activations of 16"):
        linear(found, torch.zeros(2, 16), pack(found, torch.zeros(16, 32)))
    with pytest.raises(ValueError, match="int8 activations need an NVFP4 weight"):
        linear(found, torch.zeros(2, 32), pack(found, torch.zeros(16, 32)), int8=True)


def network(config: ModelConfig) -> Hybrid:
    torch.manual_seed(3)
    model = Hybrid(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in name:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def over(of: Library, model: Hybrid) -> Decoder:
    """For the NVFP4 values of the model's weights, which it sees itself from now on."""
    given = dict(model.weights())
    model.load_weights(given.items())
    return decoder(model.config, given, of)


@pytest.fixture
def threads():
    """Sets torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_decode_step_is_that_of_the_network(tier, name, threads):
    config = ModelConfig(**SMALL, **CONFIGS[name])
    model = network(config)
    step = over(tier, model)
    assert step.kernels == tier.tier
    ours, theirs = Cache.empty(config, 7, 40), Cache.empty(config, 5, 40)
    rows = torch.tensor([6, 0, 3, 2, 5])
    for turn in range(40):
        threads(1 + turn % 3)
        ids = torch.randint(config.vocab_size, (5,))
        expected = model(ids[:, None], None, theirs)[:, 0]
        found = step.step(ids, rows, ours)
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert ours.lengths.tolist() == [40, 0, 40, 40, 0, 40, 40]
    for index, (first, second) in theirs.layers.items():
        torch.testing.assert_close(ours.layers[index][0][rows], first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.layers[index][1][rows], second, rtol=1e-4, atol=1e-4)
        assert not ours.layers[index][1][[1, 4]].any()
    with pytest.raises(ValueError, match="holds 40 tokens a row; 41 are needed"):
        step.step(ids, rows, ours)
    with pytest.raises(IndexError, match="ids from 0 to 55; got 56"):
        step.step(torch.tensor([56]), torch.tensor([1]), ours)


def in_float64(model: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the network computes in float64, also where it says float32 and where torch has no float64 for it."""

    def grouped(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        parts = x.tensor_split(offs.tolist()[:-1])
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])

    model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_decode_step_is_that_of_float64_whatever_lay_in_its_memory(tier, name, monkeypatch):
    config = ModelConfig(**SMALL, **CONFIGS[name])
    model = network(config)
    step = over(tier, model)
    rows = torch.tensor([4, 0, 3])
    ours, theirs = Cache.empty(config, 6, 12), Cache.empty(config, 3, 12)
    for index, tensors in ours.layers.items():
        for tensor in tensors:
            fresh = tensor[rows]
            tensor.fill_(torch.nan)
            if index not in ours.attention:  # of which clear() leaves what was there
                tensor[rows] = fresh
    theirs.layers = {index: (first.double(), second.double()) for index, (first, second) in theirs.layers.items()}
    in_float64(model, monkeypatch)
    for _ in range(12):
        ids = torch.randint(config.vocab_size, (3,))
        expected = model(ids[:, None], None, theirs)[:, 0]
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", lambda shape, **how: torch.full(shape, torch.nan, **how))
            found = step.step(ids, rows, ours)
        assert expected.dtype == torch.float64
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    for tensors in ours.layers.values():
        assert all(tensor[[1, 2, 5]].isnan().all() for tensor in tensors)


@torch.no_grad()
def test_no_number_depends_on_the_others_nor_on_how_tokens_came(tier, threads):
    config = ModelConfig(**SMALL, **CONFIGS["latent"])
    step = over(tier, network(config))
    together, alone, divided = (Cache.empty(config, 20, 50) for _ in range(3))
    texts = [torch.randint(config.vocab_size, (3 + 2 * n,)).tolist() for n in range(20)]
    threads(2)
    step.prefill(texts, list(range(20)), together)
    threads(1)
    for row, text in enumerate(texts):
        for token in text:
            step.step(torch.tensor([token]), torch.tensor([row]), alone)
        step.prefill([text[:2]], [row], divided)
        step.prefill([text[2:]], [row], divided)
    for other in (alone, divided):
        assert torch.equal(together.lengths, other.lengths)
        for index, tensors in together.layers.items():
            assert all(torch.equal(*pair) for pair in zip(tensors, other.layers[index], strict=True))
    ids = torch.randint(config.vocab_size, (20,))
    logits = step.step(ids, torch.arange(20), together)
    for row in (0, 7, 19):
        assert torch.equal(step.step(ids[row : row + 1], torch.tensor([row]), alone)[0], logits[row])


@torch.no_grad()
def test_what_the_kernels_do_not_take_runs_in_torch_with_the_same_numbers():
    config = ModelConfig(**SMALL | CONFIGS["latent"] | {"head_dim": 8})
    assert not fits(config)
    weights = dict(network(config).weights())
    step, wide = decoder(config, weights, library()), ModelConfig(**SMALL, **CONFIGS["latent"])
    assert step.kernels == "torch"
    given = dict(network(wide).weights())
    plain, fast = decoder(wide, given, None), decoder(wide, given, library())
    caches = [Cache.empty(wide, 4, 20) for _ in range(2)]
    for cache, of in zip(caches, (plain, fast), strict=True):
        of.prefill([[1, 2, 3], [4, 5, 6, 7, 8]], [3, 1], cache)
        of.prefill([[9]], [3], cache)
    ids, rows = torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3])
    expected, found = (of.step(ids, rows, cache) for of, cache in zip((plain, fast), caches, strict=True))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [1, 6, 0, 5]


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_the_variable_chooses_a_tier_or_none():
    code = "from palaestra.kernels.native import library; found = library(); print(found and found.tier)"
    assert in_a_process(code, PALAESTRA_KERNELS="portable").stdout == "portable\n"
    assert in_a_process(code, PALAESTRA_KERNELS="torch").stdout == "None\n"
    refused = in_a_process(code, PALAESTRA_KERNELS="neon")
    assert "PALAESTRA_KERNELS=neon: this machine has no such tier" in refused.stderr


def test_a_package_without_the_library_warns_once_and_works():
    code = (
        "import pathlib, palaestra.kernels.native as native\n"
        "native.FILE = pathlib.Path('/nowhere/_cpu.so')\n"
        "print(native.library(), native.library())"
    )
    done = in_a_process(code)
    assert done.stdout == "None None\n"
    assert done.stderr.count("palaestra was installed without a C compiler") == 1


def test_threads_survive_a_fork():
    code = (
        "import os, torch\n"
        "from palaestra.kernels.linear import linear, pack\n"
        "from palaestra.kernels.native import library\n"
        "packed, x = pack(library(), torch.randn(64, 64)), torch.randn(3, 64)\n"
        "before = linear(library(), x, packed, 2)\n"
        "if not (child := os.fork()):\n"
        "    os._exit(0 if torch.equal(linear(library(), x, packed, 2), before) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert in_a_process(code).stdout == "0\n"
