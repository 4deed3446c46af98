"""Quantising and the Hadamard transform in C against plain PyTorch, in every tier; what torch knows of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_native import in_a_process, tiers

from palaestra.kernels import hadamard, nvfp4
from palaestra.kernels import nvfp4_plain as plain
from palaestra.kernels.native import FILE, Library
from palaestra.kernels.nvfp4 import NVFP4, Recipe, dequantize, fake_quantize, quantize, transpose

RULES = ("max", "error", "four-or-six")
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(params=tiers())
def tier(request):
    yield request.param, Library(FILE, request.param)
    Library(FILE, None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def in_torch(monkeypatch):
    """As where there was no compiler."""
    monkeypatch.setattr(nvfp4, "library", lambda: None)
    monkeypatch.setattr(hadamard, "library", lambda: None)


def same(one: NVFP4, other: NVFP4) -> bool:
    """Bit for bit."""
    codes = torch.equal(one.codes, other.codes)
    scales = torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
    return codes and scales and torch.equal(one.scale2, other.scale2)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def drawn(
    shape: tuple[int, ...], seed: int, size: float = 1.0, spread: float = 1.0, grid: bool = False
) -> torch.Tensor:
    """Rows of very different sizes; `grid`: with many ties; the first block zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if grid:
        weight = (weight * 8).round() / 8
    weight = weight * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator)) * size
    weight.flatten()[:16] = 0
    return weight


@settings(max_examples=60, deadline=None)
@given(
    matrices=st.integers(1, 3),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 40),
    rule=st.sampled_from(RULES),
    square=st.booleans(),
    given_=st.booleans(),
    size=st.sampled_from([1e-38, 1e-30, 1e-3, 1.0, 2688.0, 1e20]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    grid=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_c_gives_the_plain_versions_bits(matrices, rows, blocks, rule, square, given_, size, spread, grid, seed):
    weight = drawn((matrices, rows * (16 if square else 1), 16 * blocks), seed, size, spread, grid)
    scale2 = (weight.abs().amax((1, 2)) / 2688).clamp(min=1e-36) if given_ else None
    recipe = Recipe(rule, square)
    expected = plain.quantize(weight, recipe, scale2)
    for name in tiers():
        Library(FILE, name)
        assert same(quantize(weight, recipe, scale2), expected)
        assert same_bits(dequantize(expected), plain.dequantize(expected))
        assert same_bits(fake_quantize(weight, recipe), plain.fake_quantize(weight, recipe))
    Library(FILE, None)


@pytest.mark.parametrize("rule", ["error", "four-or-six"])
def test_errors_that_differ_by_their_rounding_alone_compare_alike(tier, rule):
    """Dozens of these blocks get other scales where errors are summed in another order."""
    weight = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)) * 3).round() * 0.3
    for square in (False, True):
        assert same(quantize(weight, Recipe(rule, square)), plain.quantize(weight, Recipe(rule, square)))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 9),
    size=st.sampled_from(hadamard.SIZES),
    inverse=st.booleans(),
    signs=st.sampled_from([0, 7]),
    seed=st.integers(0, 9999),
)
def test_the_transform_is_the_plain_one_and_alike_alone_and_in_front(rows, blocks, size, inverse, signs, seed):
    x = torch.randn(rows, size * blocks, generator=torch.Generator().manual_seed(seed))
    expected = hadamard.transform_plain(x.double(), size, signs, inverse)
    for name in tiers():
        Library(FILE, name)
        found = (hadamard.inverse if inverse else hadamard.transform)(x, size, signs)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        for rule in RULES:
            fused = quantize(x, Recipe(rule, hadamard=size, signs=signs))
            assert same(fused, quantize(hadamard.transform(x, size, signs), Recipe(rule)))
    Library(FILE, None)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("error", square=True), Recipe(hadamard=128, signs=3)])
def test_threads_change_nothing(tier, threads, recipe):
    weight = drawn((3, 272, 640), 0)
    found = []
    for count in (1, 2, 5):
        threads(count)
        drawing = recipe._replace(rule="max", generator=torch.Generator().manual_seed(4))
        values = dequantize(quantize(weight, drawing))
        assert same_bits(values, fake_quantize(weight, drawing._replace(generator=torch.Generator().manual_seed(4))))
        found.append((quantize(weight, recipe), values, hadamard.transform(weight, 64, 5)))
    for quantised, values, transformed in found[1:]:
        assert same(quantised, found[0][0])
        assert same_bits(values, found[0][1])
        assert same_bits(transformed, found[0][2])


def test_draws_are_the_same_in_every_tier_and_others_for_another_seed():
    weight = drawn((48, 80), 1)
    found = []
    for name in tiers():
        Library(FILE, name)
        found.append(quantize(weight, Recipe(generator=torch.Generator().manual_seed(9))))
    Library(FILE, None)
    assert all(same(found[0], other) for other in found)
    generator = torch.Generator().manual_seed(9)
    first, second = (quantize(weight, Recipe(generator=generator)) for _ in range(2))
    assert same(first, found[0])
    assert not torch.equal(first.codes, second.codes)


def test_stochastic_rounding_is_unbiased_between_all_codes(tier):
    points = torch.cat([lo + (hi - lo) * torch.linspace(0, 1, 9) for lo, hi in itertools.pairwise(GRID)])
    points = torch.cat([points, -points])
    weight = torch.zeros(1, 16 * -(-len(points) // 15))
    places = [place for place in range(weight.shape[1]) if place % 16 != 15][: len(points)]
    weight[0, places] = points
    weight[0, 15::16] = 6.0  # so that every block has the scale 1
    draws = 20000
    recipe = Recipe(generator=torch.Generator().manual_seed(5))
    found = dequantize(quantize(weight.repeat(draws, 1), recipe, scale2=torch.tensor(1.0)))[:, places].double()
    below = GRID[torch.searchsorted(GRID, points.abs(), right=True) - 1]
    exact = torch.isin(points.abs(), GRID)
    assert torch.equal(found[:, exact].float(), points[exact].expand(draws, -1))
    step = torch.where(points.abs() < 2, 0.5, torch.where(points.abs() < 4, 1.0, 2.0))
    assert torch.isin(found.abs().float(), GRID).all()
    assert (((found.abs() - below) == 0) | ((found.abs() - below) == step))[:, ~exact].all()
    share = ((points.abs() - below) / step).double()
    error = (share * (1 - share) / draws).sqrt() * step
    assert ((found.mean(0) - points).abs() <= 4 * error)[~exact].all()
    both = torch.corrcoef(found[:, ~exact].T)  # of neighbours in a block, too
    assert (both - torch.eye(len(both))).abs().max() < 5 / math.sqrt(draws)
    along = found[:, ~exact] - found[:, ~exact].mean(0)
    serial = (along[1:] * along[:-1]).mean(0) / along.square().mean(0)
    assert serial.abs().max() < 5 / math.sqrt(draws)


@pytest.mark.parametrize("kind", ["C", "torch"])
def test_refusals_are_the_same(kind, request):
    if kind == "torch":
        request.getfixturevalue("in_torch")
    infinite, generator = torch.zeros(2, 16), torch.Generator()
    infinite[1, 3] = -math.inf
    for weight, recipe, words in (
        (infinite, Recipe(), r"cannot hold infinities or NaN; the weight \[2, 16\] has some"),
        (infinite * 0, Recipe(), r"cannot hold infinities or NaN; the weight \[2, 16\] has some"),
        (torch.zeros(2, 24), Recipe(), r"K a multiple of 16; got \[2, 24\]"),
        (torch.zeros(16), Recipe(), r"K a multiple of 16; got \[16\]"),
        (torch.zeros(0, 16), Recipe(), r"K a multiple of 16; got \[0, 16\]"),
        (torch.zeros(24, 16), Recipe(square=True), r"N a multiple of 16; got \[24, 16\]"),
        (torch.zeros(2, 48), Recipe(hadamard=32), r"of size 32 needs K a multiple of it; got \[2, 48\]"),
        (torch.zeros(2, 48), Recipe(hadamard=24), "has the sizes 16, 32, 64, 128; got 24"),
        (torch.zeros(2, 16), Recipe("error", generator=generator), "only under the rule 'max', not 'error'"),
    ):
        for function in (quantize, fake_quantize):
            with pytest.raises(ValueError, match=words):
                function(weight, recipe)
    stack = torch.tensor([1.0, 5000.0])[:, None, None].expand(2, 1, 16)
    with pytest.raises(ValueError, match=r"global scale \[1\.0, 1\.0\] values up to 5000 do not fit"):
        quantize(stack, scale2=torch.ones(2))


@pytest.mark.parametrize("kind", ["C", "torch"])
def test_a_given_scale_that_is_a_bit_too_small_makes_no_nan(kind, request):
    if kind == "torch":
        request.getfixturevalue("in_torch")
    weight = torch.full((1, 16), 2688.0 * (1 + 2.0**-21))
    quantised = quantize(weight, Recipe(generator=torch.Generator().manual_seed(0)), scale2=torch.tensor(1.0))
    assert dequantize(quantised).unique().tolist() == [2688.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides_are_quantised_as_float32(dtype):
    weight = drawn((64, 48), 3).to(dtype).T
    assert same(quantize(weight), plain.quantize(weight.float().contiguous()))
    values = fake_quantize(weight)
    assert values.dtype == torch.float32
    assert torch.equal(values, dequantize(quantize(weight)))
    part = quantize(drawn((4, 32, 64), 4))
    assert torch.equal(dequantize(NVFP4(*(tensor[1] for tensor in part))), dequantize(part)[1])
    torch.testing.assert_close(hadamard.transform(weight.T, 16, 3).T, hadamard.transform_plain(weight.T, 16, 3).T)


def test_one_global_scale_may_serve_a_stack():
    stack = drawn((3, 4, 32), 5)
    scale2 = stack.abs().max() / 2688
    quantised = quantize(stack, scale2=scale2)
    assert torch.equal(quantised.scale2, scale2.expand(3))
    assert same(quantised, plain.quantize(stack, scale2=scale2.expand(3)))


@pytest.mark.parametrize("rule", RULES)
def test_the_transpose_is_that_of_the_matrix(rule):
    stack = drawn((2, 48, 80), 6)
    recipe = Recipe(rule, square=True)
    assert same(transpose(quantize(stack, recipe)), quantize(stack.mT, recipe))


def test_gradients_pass_straight_through_and_back_through_the_transform():
    weight = drawn((4, 64), 7).requires_grad_()
    upstream = torch.randn(4, 64, generator=torch.Generator().manual_seed(8))
    fake_quantize(weight, Recipe(hadamard=32, signs=5)).backward(upstream)
    torch.testing.assert_close(weight.grad, hadamard.inverse(upstream, 32, 5))
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    for function in (hadamard.transform, hadamard.inverse):
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, 16, 3), (x,))


def test_the_variable_leaves_everything_to_torch():
    code = (
        "import torch; from palaestra.kernels import native, nvfp4, nvfp4_plain; w = torch.randn(4, 32)\n"
        "assert native.library() is None and torch.equal(nvfp4.fake_quantize(w), nvfp4_plain.fake_quantize(w))\n"
        "print('same')"
    )
    assert in_a_process(code, PALAESTRA_KERNELS="torch").stdout == "same\n"


# -- what torch knows


@pytest.mark.parametrize("kind", ["C", "torch"])
@pytest.mark.parametrize("flat", [("max", False, 0, 0, None), ("error", True, 16, 3, None), ("max", False, 0, 0, 55)])
def test_registered_quantisation_passes_torchs_own_check(kind, flat, request):
    if kind == "torch":
        request.getfixturevalue("in_torch")
    weight = drawn((2, 32, 48), 9)
    torch.library.opcheck(torch.ops.palaestra.nvfp4_quantize, (weight, *flat, None))
    torch.library.opcheck(torch.ops.palaestra.nvfp4_quantize, (weight, *flat, weight.abs().amax((1, 2)) / 2000))
    torch.library.opcheck(torch.ops.palaestra.nvfp4_fake_quantize, (weight.requires_grad_(), *flat))


@pytest.mark.parametrize("kind", ["C", "torch"])
def test_registered_transform_and_dequantisation_pass_torchs_own_check(kind, request):
    if kind == "torch":
        request.getfixturevalue("in_torch")
    quantised = quantize(drawn((2, 32, 48), 10))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # its schema test lacks fp8
    torch.library.opcheck(torch.ops.palaestra.nvfp4_dequantize, tuple(quantised), test_utils=checks)
    torch.library.opcheck(torch.ops.palaestra.hadamard, (torch.randn(3, 64, requires_grad=True), 32, 3, True))


def test_a_graph_sees_opaque_operations():
    def values(weight: torch.Tensor) -> torch.Tensor:
        return dequantize(quantize(hadamard.transform(weight, 16, 3))) + fake_quantize(weight)

    weight = drawn((32, 48), 11)
    program = torch.export.export(Whole(values), (weight,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if name.startswith("palaestra")] == [
        "palaestra.hadamard.default",
        "palaestra.nvfp4_quantize.default",
        "palaestra.nvfp4_dequantize.default",
        "palaestra.nvfp4_fake_quantize.default",
    ]
    assert torch.equal(program.module()(weight), values(weight))
    compiled = torch.compile(values, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), values(weight))


class Whole(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
