"""FP8 in plain PyTorch: E4M3 values and one float32 scale a tensor, in which published checkpoints keep some layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0


class FP8(NamedTuple):
    """A quantised tensor. values: float8_e4m3fn [...]; scale: float32[], by which they are multiplied."""

    values: Tensor
    scale: Tensor


def quantize(weight: Tensor) -> FP8:
    """Quantise float [...], its largest magnitude becoming 448, round to nearest even; scale 1 for zeros.

    Raises ValueError for infinities or NaN.
    """
    amax = weight.float().abs().amax() if weight.numel() else torch.zeros(())
    if not torch.isfinite(amax):
        raise ValueError(f"FP8 cannot hold infinities or NaN; the weight {list(weight.shape)} has some")
    scale = torch.where(amax > 0, (amax / LARGEST).clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(amax))
    return FP8((weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale)


def dequantize(quantised: FP8) -> Tensor:
    """float32 [...]."""
    return quantised.values.float() * quantised.scale


def linear(x: Tensor, weight: FP8) -> Tensor:
    """x W^T: float [..., K] and FP8 [N, K] -> [..., N] in the dtype of `x`."""
    return torch.nn.functional.linear(x, dequantize(weight).to(x.dtype))
