"""The Triton kernels against PyTorch in float64, on a CUDA device or in Triton's interpreter. `test_kernels_triton.py`
runs this file in a process of its own, since the interpreter is chosen when triton is first imported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from torch import Tensor

from palaestra.kernels import dispatch, hadamard, nvfp4
from palaestra.kernels.attention import Pages, attend_plain
from palaestra.kernels.experts import Routing
from palaestra.kernels.linear import linear_plain
from palaestra.kernels.mamba import Mixer, Slots, scan_plain
from palaestra.kernels.native import TORCH
from palaestra.kernels.nvfp4 import NVFP4, Recipe
from palaestra.kernels.triton import available, blackwell, products
from palaestra.kernels.triton import mamba as decode
from palaestra.kernels.triton.attention import attend
from palaestra.kernels.triton.experts import experts, route
from palaestra.kernels.triton.linear import linear
from palaestra.kernels.triton.quantize import Hadamard, quantize, transform
from palaestra.kernels.triton.scan import scan
from palaestra.model import mamba as plain_mamba
from palaestra.model.config import ModelConfig
from palaestra.model.moe import Router

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
DTYPES = [torch.float32, torch.bfloat16]
STANDARD_ERRORS, OFTEN = 4, 8
DRAWS = 96 if INTERPRETED else 4096


@pytest.fixture(autouse=True)
def prepared():
    """The same numbers every time, and NaN in all memory that nothing has written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """By norm, within what the dtype allows."""
    assert found.shape == exact.shape
    error = (found.double() - exact.double()).norm() / exact.double().norm()
    assert error < BOUND[dtype or found.dtype], error


def unbiased(drawn: Tensor, exact: Tensor) -> None:
    """drawn [n, ...]: each value is one of two, and where both came often their mean is `exact` within some standard
    errors; so is the mean over all values, relative to their size."""
    drawn, exact = drawn.double().flatten(1), exact.flatten()
    low, high = drawn.amin(0), drawn.amax(0)
    assert ((drawn == low) | (drawn == high)).all()
    often = (torch.minimum((drawn == low).sum(0), (drawn == high).sum(0)) >= OFTEN) & (low < high)
    assert often.sum() > len(often) / 4
    allowed = STANDARD_ERRORS * drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() <= allowed)[often].all()
    whole = ((drawn - exact) / exact).sum(1)
    assert whole.mean().abs() < STANDARD_ERRORS * whole.std() / len(drawn) ** 0.5


def test_they_can_run_here():
    assert available()


# --- products

ODD = [(1, 3, 16), (1, 37, 1040), (2, 16, 272), (4, 5, 48), (5, 70, 144), (17, 3, 16), (70, 65, 48)]
REAL = [(rows, *shape) for rows in (1, 2, 4, 8, 64) for shape in ((2688, 1024), (1856, 2688), (4096, 4096))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "columns"), ODD if INTERPRETED else REAL)
def test_products(rows, outputs, columns, dtype):
    x, weight = randn(rows, columns, dtype=dtype), nvfp4.quantize(randn(outputs, columns))
    found = linear(x, weight)
    assert found.dtype == dtype
    close(found, x.double() @ nvfp4.dequantize(weight).double().T)
    close(found, linear_plain(x, weight), torch.bfloat16)


@pytest.mark.parametrize("rows", [5, 16])
def test_products_of_more_rows_without_dot(rows, monkeypatch):
    monkeypatch.setattr(products, "VECTOR_ROWS", 16)
    x, weight = randn(rows, 80), nvfp4.quantize(randn(20, 80))
    close(linear(x, weight), x.double() @ nvfp4.dequantize(weight).double().T)


def test_products_with_every_code_and_scale():
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat_interleave(16)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(126)[:, None] * torch.ones(1, 8, dtype=torch.uint8)
    weight = NVFP4(codes.to(DEVICE), scales.to(DEVICE), torch.tensor(0.25, device=DEVICE))
    x = torch.eye(16, device=DEVICE)
    for rows in (slice(12, 16), slice(16)):  # without tl.dot, and with it
        assert torch.equal(linear(x[rows], weight), nvfp4.dequantize(weight).T[rows])


def test_products_of_no_rows_and_of_wrong_ones():
    weight = nvfp4.quantize(randn(3, 32))
    assert linear(randn(0, 32), weight).shape == (0, 3)
    assert linear(randn(2, 2, 32), weight).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="32 columns"):
        linear(randn(1, 16), weight)
    with pytest.raises(ValueError, match="float64"):
        linear(randn(1, 32).double(), weight)


# --- experts


def exact_experts(x: Tensor, up: NVFP4, down: NVFP4, chosen: Tensor, weights: Tensor) -> Tensor:
    up_values, down_values = nvfp4.dequantize(up).double(), nvfp4.dequantize(down).double()
    hidden = torch.einsum("tw,tkiw->tki", x.double(), up_values[chosen]).relu().square()
    return torch.einsum("tki,tkwi,tk->tw", hidden, down_values[chosen], weights.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "count", "top", "width", "inner"),
    [(1, 8, 3, 32, 48), (7, 4, 2, 16, 80), (40, 3, 2, 48, 16)]
    if INTERPRETED
    else [(1, 64, 22, 1024, 2688), (16, 64, 22, 1024, 2688), (64, 32, 6, 2688, 1856)],
)
def test_experts(tokens, count, top, width, inner, dtype):
    x = randn(tokens, width, dtype=dtype)
    up, down = nvfp4.quantize(randn(count, inner, width)), nvfp4.quantize(randn(count, width, inner))
    chosen = torch.rand(tokens, count - 1, device=DEVICE).topk(top).indices  # the last expert has no token
    weights = torch.rand(tokens, top, device=DEVICE)
    found = experts(x, up, down, chosen, weights)
    assert found.dtype == dtype
    close(found, exact_experts(x, up, down, chosen, weights))
    assert torch.equal(found, experts(x, up, down, chosen, weights))


@pytest.mark.parametrize(
    ("count", "routing"),
    [
        (8, Routing(1)),
        (24, Routing(5, factor=2.5)),
        (12, Routing(4, groups=3, top_groups=2, normalise=False)),
        (512, Routing(22, factor=5.0)),
    ],
)
def test_the_router(count, routing):
    config = ModelConfig(
        hybrid_override_pattern="E",
        hidden_size=count,
        n_routed_experts=count,
        num_experts_per_tok=routing.top,
        n_group=routing.groups,
        topk_group=routing.top_groups,
        norm_topk_prob=routing.normalise,
        routed_scaling_factor=routing.factor,
    )
    router = Router(config).to(DEVICE).eval()
    router.weight.data = torch.eye(count, device=DEVICE)
    router.e_score_correction_bias += 0.3 * randn(count)
    logits = randn(9, count)
    chosen, weights = route(logits, router.e_score_correction_bias, routing)
    plain_chosen, plain_weights = router(logits)
    assert torch.equal(chosen, plain_chosen)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-5, atol=1e-6)


def test_outside_the_best_groups_the_router_takes_scores_for_0():
    bias = torch.tensor([-2.0] * 4 + [-3.0] * 4, device=DEVICE)
    chosen, _ = route(torch.zeros(1, 8, device=DEVICE), bias, Routing(4, groups=2, top_groups=1))
    assert sorted(chosen[0].tolist()) == [4, 5, 6, 7]


def test_of_equal_scores_the_router_takes_the_lower_index():
    chosen, weights = route(torch.zeros(1, 8, device=DEVICE), torch.zeros(8, device=DEVICE), Routing(3))
    assert chosen.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.full((1, 3), 1 / 3))


# --- quantisation


def same(ours: NVFP4, plain: NVFP4) -> None:
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    assert torch.equal(ours.scale2, plain.scale2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [1e-38, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("shape", [(16, 16), (2, 32, 48)] if INTERPRETED else [(4096, 4096), (8, 2688, 1024)])
def test_quantisation_is_the_plain_one_bit_for_bit(shape, size, square, dtype):
    if dtype == torch.bfloat16 and INTERPRETED:
        size = max(size, 1e-30)  # the interpreter loses subnormal bf16 numbers
    weight = (randn(*shape) * 8).round() / 8  # many ties
    weight *= torch.exp(3 * randn(*shape[:-1], 1)) * size
    weight[..., 1, :16], weight[..., 2, 0] = 0, -0.0
    weight = weight.to(dtype)
    same(quantize(weight, square), nvfp4.quantize(weight, Recipe(square=square)))


def test_quantisation_of_every_e4m3_scale_and_of_its_ties():
    scale = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (scale[1:] + scale[:-1]) / 2
    amax = 6 * torch.cat([scale, between, torch.nextafter(between, between * 2), torch.nextafter(between, between * 0)])
    weight = (amax[:, None] * torch.linspace(-1, 1, 16)).to(DEVICE)
    same(quantize(weight), nvfp4.quantize(weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantisation_refuses_what_it_cannot_hold(bad):
    weight = randn(3, 32)
    weight[1, 20] = bad
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize(weight)
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize(randn(3, 24))


@pytest.mark.parametrize("square", [False, True])
def test_stochastic_rounding_is_unbiased(square):
    row = randn(32) * torch.exp(2 * randn(32))
    many = row.expand(DRAWS, 32).contiguous()
    drawn = quantize(many, square, seed=7)
    unbiased(nvfp4.dequantize(drawn), row.double())
    plain = nvfp4.quantize(many, Recipe(square=square, generator=torch.Generator(DEVICE).manual_seed(7)))
    assert torch.equal(drawn.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    same(drawn, quantize(many, square, seed=7))
    assert not torch.equal(drawn.codes, quantize(many, square, seed=8).codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", hadamard.SIZES)
def test_the_hadamard_transform(size, dtype):
    x, rotation = randn(3, 5, 3 * size, dtype=dtype), Hadamard(size, seed=5)
    found = transform(x, rotation)
    assert found.dtype == dtype
    close(found, hadamard.transform(x.double(), size, 5))
    same(quantize(x, rotation=rotation), nvfp4.quantize(found))
    with pytest.raises(ValueError, match="multiple of it"):
        transform(randn(2, 8), rotation)


# --- Mamba


def mixer(heads: int, dim: int, state: int, groups: int, kernel: int) -> plain_mamba.Mamba:
    """A plain mixer in float64 without its projections, and with parameters that matter."""
    config = ModelConfig(
        hybrid_override_pattern="M",
        mamba_num_heads=heads,
        mamba_head_dim=dim,
        ssm_state_size=state,
        n_groups=groups,
        conv_kernel=kernel,
    )
    made = plain_mamba.Mamba(config).to(DEVICE)
    for parameter in (made.D, made.norm.weight, made.conv1d.weight, made.conv1d.bias, made.A_log):
        parameter.data += 0.3 * torch.randn_like(parameter)
    made.in_proj = made.out_proj = torch.nn.Identity()
    return made.double().requires_grad_(False)


def fused(made: plain_mamba.Mamba) -> Mixer:
    conv = made.conv1d
    parts = (conv.weight[:, 0].T, conv.bias, made.dt_bias, -torch.exp(made.A_log), made.D, made.norm.weight)
    config = made.config
    return Mixer(*(part.float().contiguous() for part in parts), config.n_groups, config.layer_norm_epsilon)


SHAPES = [(4, 8, 16, 2, 4), (3, 5, 7, 1, 2), (6, 16, 24, 3, 5)] if INTERPRETED else [(64, 64, 128, 8, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_steps(shape, kept, dtype):
    heads, dim, state, _, kernel = shape
    made = mixer(*shape)
    channels = made.config.conv_width
    pool = Slots(randn(6, kernel - 1, channels, dtype=dtype), randn(6, heads, dim, state, dtype=kept))
    slots = torch.tensor([4, 0, 3], device=DEVICE)
    untouched = pool.windows[[1, 2, 5]], pool.states[[1, 2, 5]]
    if kept == torch.float32:
        pool.states[slots[:2]] = 0  # then the first step's states are proportional to dt
    for _ in range(2):
        past = pool.windows[slots].double(), pool.states[slots].double()
        projected = randn(3, heads * dim + channels + heads, dtype=dtype)
        projected[:2, -heads:] = torch.tensor([[-12.0], [-5.0]])  # softplus far below 1
        exact = made(projected[:, None].double(), None, past)[:, 0]
        found = decode.step(projected, fused(made), pool, slots)
        assert found.dtype == dtype
        close(found, exact)
        for slot, state in zip(slots, past[1], strict=True):
            close(pool.states[slot], state)
        assert torch.equal(pool.windows[slots].double(), past[0])
    assert torch.equal(pool.windows[[1, 2, 5]], untouched[0])
    assert torch.equal(pool.states[[1, 2, 5]], untouched[1])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_states_are_rounded_without_bias(kept):
    made, slots = mixer(1, 2, 16, 1, 4), torch.arange(DRAWS, device=DEVICE)
    parameters = replace(fused(made), a=torch.full((1,), -1.5e-3, device=DEVICE))  # a decay that nearest would lose
    window, state = randn(1, 3, made.config.conv_width), randn(1, 1, 2, 16, dtype=kept)
    window[..., :2] = 1e-4
    state[..., :4] *= 1e-5  # subnormal in float16
    projected = randn(1, 2 + made.config.conv_width + 1).expand(DRAWS, -1)
    rounded = Slots(window.repeat(DRAWS, 1, 1), state.repeat(DRAWS, 1, 1, 1))
    kept_whole = Slots(window.clone(), state.float())
    decode.step(projected, parameters, rounded, slots, seed=3)
    decode.step(projected[:1], parameters, kept_whole, slots[:1])
    unbiased(rounded.states, kept_whole.states[0].double())
    about, numbers = kept_whole.states, torch.finfo(kept)
    spacing = numbers.eps * torch.clamp(about.abs(), min=numbers.smallest_normal)
    assert ((rounded.states.float() - about).abs() <= spacing).all()
    with pytest.raises(ValueError, match="stochastic"):
        decode.step(projected[:1], parameters, kept_whole, slots[:1], seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "state", "groups"),
    [([1, 0, 65, 64], 2, 16, 16, 1), ([70, 130], 4, 5, 7, 2)]
    if INTERPRETED
    else [([512, 1, 0, 2049], 64, 64, 128, 8), ([300] * 4, 128, 64, 128, 8)],
)
def test_the_scan_and_its_gradients(lengths, heads, dim, state, groups, dtype):
    tokens = sum(lengths)
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    inputs = [
        randn(tokens, heads, dim, dtype=dtype),
        torch.rand(tokens, heads, device=DEVICE) / 4,
        -torch.rand(heads, device=DEVICE),
        randn(tokens, groups, state, dtype=dtype),
        randn(tokens, groups, state, dtype=dtype),
        randn(len(lengths), heads, dim, state),
    ]
    ours = [part.clone().requires_grad_() for part in inputs]
    exact = [part.double().requires_grad_() for part in inputs]
    y, last = scan(*ours, starts)
    x, dt, a, b, c, first = exact
    plain = [
        scan_plain(x[None, at], dt[None, at], a, b[None, at], c[None, at], torch.zeros_like(a), first[None, index])
        for index, length in enumerate(lengths)
        if (at := slice(int(starts[index]), int(starts[index]) + length)) and length
    ]
    plain_y = torch.cat([y[0] for y, _ in plain])
    ends = iter(plain)
    plain_last = torch.stack([next(ends)[1][0] if n else first[i] for i, n in enumerate(lengths)])
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    close(y, plain_y)
    close(last, plain_last, dtype)
    upstream = randn(*y.shape, dtype=dtype), randn(*last.shape)
    torch.autograd.backward((y, last), upstream)
    torch.autograd.backward((plain_y, plain_last), tuple(part.double() for part in upstream))
    for mine, theirs in zip(ours, exact, strict=True):
        close(mine.grad, theirs.grad, dtype)


# --- attention


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "lengths"),
    [(4, 1, 24, 5, [200, 0, 83]), (6, 2, 16, 16, [64, 65, 1])]
    if INTERPRETED
    else [(32, 2, 128, 16, [1, 0, 4097, 30000]), (32, 8, 128, 64, [700])],
)
def test_attention_over_a_paged_cache(heads, kv_heads, dim, page, lengths, dtype, kept):
    pages = -(-max(lengths) // page) + 1
    table = torch.randperm(pages * len(lengths) + 3)[: pages * len(lengths)].view(-1, pages)
    keys, values = (randn(pages * len(lengths) + 3, kv_heads, page, dim).to(kept) for _ in range(2))
    scales = (0.5, 3.0) if kept.itemsize == 1 else (1.0, 1.0)
    counts = torch.tensor(lengths, device=DEVICE)
    cache = Pages(keys, values, table.to(DEVICE, torch.int32), *scales)
    q = randn(len(lengths), heads, dim, dtype=dtype)
    found = attend(q, cache, counts)
    assert found.dtype == dtype
    close(found, attend_plain(q.double(), cache, counts))
    assert not found[counts == 0].any()


# --- Blackwell


def test_products_of_two_nvfp4_matrices_need_their_device():
    x, weight = (nvfp4.quantize(randn(128, 256)) for _ in range(2))
    if blackwell.supported(x.codes.device):
        close(blackwell.linear(x, weight), nvfp4.dequantize(x).double() @ nvfp4.dequantize(weight).double().T)
    else:
        with pytest.raises(RuntimeError, match=r"10\.x"):
            blackwell.linear(x, weight)


# --- what picks them


def test_each_operations_one_function_picks_these():
    weight, x = nvfp4.quantize(randn(48, 32)), randn(3, 32)
    picked = dispatch.linear(weight)
    assert picked.kernels == dispatch.kernels_for(x.device) == dispatch.TRITON
    close(picked(x), x.double() @ nvfp4.dequantize(weight).double().T)
    assert dispatch.linear(nvfp4.dequantize(weight)).kernels == TORCH
    up, down, routing = nvfp4.quantize(randn(4, 48, 32)), nvfp4.quantize(randn(4, 32, 48)), Routing(2)
    chosen, weights = dispatch.route(randn(3, 4), torch.zeros(4, device=DEVICE), routing)
    close(dispatch.experts(up, down)(x, chosen, weights), exact_experts(x, up, down, chosen, weights))
    pages = Pages(randn(2, 1, 4, 16), randn(2, 1, 4, 16), torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE))
    q, lengths = randn(1, 2, 16), torch.tensor([6], device=DEVICE)
    close(dispatch.attend(q, pages, lengths), attend_plain(q.double(), pages, lengths))
