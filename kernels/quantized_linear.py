"""A linear layer that is trained in NVFP4: its three products take factors quantised along their common dimension.

    y = x W^T      W in square blocks, so that W and its transpose have the same values; x, if asked for
    dx = dy W      dy rounded stochastically
    dW = dy^T x    both after the random Hadamard transform along the tokens; dy rounded stochastically

Rounding passes gradients straight through. Source: NVIDIA's NVFP4 training recipe (arXiv 2509.25149), which quantises
activations too; in reinforcement learning they are better left as they are, as the sampler leaves them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palaestra.kernels.nvfp4 import BLOCK, NVFP4, PLAIN, Recipe, dequantize, quantize, transpose

SQUARE = Recipe(square=True)


class Precision(NamedTuple):
    """What a linear layer quantises. `gradients`: the factors of dx and dW; `hadamard`: the size of the transform (0:
    none) and `signs` the seed of its signs; `generator`: of stochastic rounding (None: to nearest even)."""

    weight: bool = True
    activations: bool = False
    gradients: bool = True
    hadamard: int = 16
    signs: int = 1
    generator: torch.Generator | None = None


def quantized_linear(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """x W^T: float [..., K] and float [N, K] -> [..., N] in the dtype of `x`.

    Raises ValueError where a factor is quantised whose dimensions are no multiples of 16, or that is not finite. The
    tokens may be of any number.
    """
    result: Tensor = _QuantizedLinear.apply(x, weight, precision)  # type: ignore[no-untyped-call]
    return result


def product(a: NVFP4 | Tensor, b: NVFP4 | Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T of [M, K] and [N, K] -> [M, N]: the one place where matrices in NVFP4 are multiplied, so that of hardware
    that multiplies them as they are. Here they are dequantised first, to `dtype`."""
    return _values(a).to(dtype) @ _values(b).to(dtype).T


def _values(matrix: NVFP4 | Tensor) -> Tensor:
    return dequantize(matrix) if isinstance(matrix, NVFP4) else matrix


def _quantised(matrix: Tensor, wanted: bool, recipe: Recipe = PLAIN) -> NVFP4 | Tensor:
    """An empty matrix (an expert without tokens) stays as it is."""
    return quantize(matrix, recipe) if wanted and matrix.numel() else matrix


def _along_tokens(matrix: Tensor, size: int) -> Tensor:
    """[T, C] -> [C, T], with zeros up to whole blocks."""
    return F.pad(matrix.T, (0, -len(matrix) % max(size, BLOCK)))


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
        seen = _quantised(weight, precision.weight, SQUARE)
        ctx.precision, ctx.dtype = precision, weight.dtype
        ctx.save_for_backward(x, *(seen if isinstance(seen, NVFP4) else (seen,)))
        flat = _quantised(x.reshape(-1, x.shape[-1]), precision.activations)
        return product(flat, seen, x.dtype).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, *parts = ctx.saved_tensors
        seen = NVFP4(*parts) if len(parts) > 1 else parts[0]
        dy, flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gradients[0], x))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _of_input(dy, seen, ctx.precision).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dw = _of_weight(dy, flat, ctx.precision).to(ctx.dtype)
        return dx, dw, None


def _of_input(dy: Tensor, weight: NVFP4 | Tensor, precision: Precision) -> Tensor:
    """dy W."""
    turned = transpose(weight) if isinstance(weight, NVFP4) else weight.T
    return product(_quantised(dy, precision.gradients, Recipe(generator=precision.generator)), turned, dy.dtype)


def _of_weight(dy: Tensor, x: Tensor, precision: Precision) -> Tensor:
    """dy^T x."""
    if not precision.gradients:
        return product(dy.T, _values(_quantised(x, precision.activations)).T, dy.dtype)
    nearest = Recipe(hadamard=precision.hadamard, signs=precision.signs)
    left, right = (_along_tokens(factor, precision.hadamard) for factor in (dy, x))
    drawn = nearest._replace(generator=precision.generator)
    return product(_quantised(left, True, drawn), _quantised(right, True, nearest), dy.dtype)
