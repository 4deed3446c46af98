"""The quantisation-aware linear layer against its formulas in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from palaestra.kernels import hadamard
from palaestra.kernels.nvfp4 import Recipe, dequantize, quantize
from palaestra.kernels.quantized_linear import Precision, quantized_linear

OFF = Precision(weight=False, gradients=False)


def factors(tokens: int = 40, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x [tokens, 48], W [64, 48] and dy [tokens, 64], some of whose values stand out."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 48), (64, 48), (tokens, 64))
    found = [
        torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator)) for shape in shapes
    ]
    return tuple(tensor.to(dtype) for tensor in found)


def run(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, ...]:
    """y, dx, dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = quantized_linear(x, weight, precision)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def seen(matrix: torch.Tensor, wanted: bool = True, **recipe) -> torch.Tensor:
    """Its quantised values in float64."""
    return (dequantize(quantize(matrix, Recipe(**recipe))) if wanted else matrix).double()


def along_tokens(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[T, C] -> [C, T], zeros up to whole blocks."""
    width = math.ceil(len(matrix) / max(size, 16)) * max(size, 16)
    return F.pad(matrix.T, (0, width - len(matrix)))


@pytest.mark.parametrize("tokens", [1, 32, 40])
@pytest.mark.parametrize(
    ("weight", "activations", "gradients", "size"),
    [
        (w, a, g, size)
        for w, a, g in itertools.product((True, False), repeat=3)
        for size in ((0, 16, 64) if g else (16,))
    ],
)
@pytest.mark.parametrize("stochastic", [True, False])
def test_all_three_products_are_their_formulas(tokens, weight, activations, gradients, size, stochastic):
    x, w, dy = factors(tokens)

    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(3) if stochastic else None

    found = run(x, w, dy, Precision(weight, activations, gradients, size, 5, generator()))
    values, draws = seen(w, weight, square=True), generator()
    left, right = (along_tokens(factor, size) for factor in (dy, x)) if gradients else (dy.T, x)
    expected = (
        seen(x, activations) @ values.T,
        seen(dy, gradients, generator=draws) @ values,
        seen(left, hadamard=size, signs=5, generator=draws) @ seen(right, hadamard=size, signs=5).T
        if gradients
        else left.double() @ seen(right, activations),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_with_nothing_quantised_it_is_a_linear_layer():
    x, w, dy = factors(7, torch.float64)
    x, w = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: quantized_linear(x, w, OFF), (x, w))
    y = F.linear(x, w)
    for ours, theirs in zip(run(x, w, dy, OFF), (y, *torch.autograd.grad(y, (x, w), dy)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gradients_are_unbiased():
    x, w, dy = factors(24)
    generator, draws = torch.Generator().manual_seed(1), 2000
    precision = Precision(generator=generator)
    runs = [run(x, w, dy, precision)[1:] for _ in range(draws)]
    left, right = (along_tokens(factor, 16) for factor in (dy, x))
    expected = (
        dy.double() @ seen(w, square=True),
        hadamard.transform(left.double(), 16, 1) @ seen(right, hadamard=16, signs=1).T,
    )
    for drawn, exact in zip(zip(*runs, strict=True), expected, strict=True):
        off = torch.stack(drawn).flatten(1).double() - exact.flatten()
        directions = torch.randn(off.shape[1], 50, generator=generator).double()
        for errors, most in ((off @ directions, 4), (off, 5)):  # of thousands of entries one may well be beyond 4
            assert (errors.mean(0).abs() * math.sqrt(draws) / errors.std(0)).max() < most
    nearest = run(x, w, dy, precision._replace(generator=None))[1] - expected[0]
    assert nearest.abs().mean() > 10 * off.mean(0).abs().mean()  # rounding to nearest is biased


def test_any_number_of_dimensions_and_tokens_and_other_dtypes():
    x, w, dy = factors(12)
    whole = run(x, w, dy, Precision())
    for ours, theirs in zip(run(x.view(3, 2, 2, 48), w, dy.view(3, 2, 2, 64), Precision()), whole, strict=True):
        assert torch.equal(ours.reshape(theirs.shape), theirs)
    y, dx, dw = run(x[:0], w, dy[:0], Precision(activations=True))
    assert (y.shape, dx.shape) == ((0, 64), (0, 48))
    assert torch.equal(dw, torch.zeros(64, 48))
    half = run(x.bfloat16(), w, dy.bfloat16(), Precision())
    assert [tensor.dtype for tensor in half] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert (half[0] - whole[0]).norm() < 0.01 * whole[0].norm()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"N a multiple of 16; got \[24, 32\]"):
        quantized_linear(torch.zeros(2, 32), torch.zeros(24, 32), Precision())
    with pytest.raises(ValueError, match=r"K a multiple of 16; got \[32, 24\]"):
        quantized_linear(torch.zeros(2, 24), torch.zeros(32, 24), Precision())
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantized_linear(torch.zeros(2, 32), torch.full((32, 32), math.inf), Precision())


def test_it_is_traced_whole():
    x, w, dy = factors(8)
    x, w = x.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(lambda x, w: quantized_linear(x, w, Precision()), backend="aot_eager", fullgraph=True)
    y = compiled(x, w)
    for ours, theirs in zip((y, *torch.autograd.grad(y, (x, w), dy)), run(x, w, dy, Precision()), strict=True):
        assert torch.equal(ours, theirs)
