"""NVFP4 in plain PyTorch: E2M1 codes, blocks of 16 along the last dimension, E4M3 block scales, one global scale.

The global scale is a power of two, 2^ceil(log2(amax / 2688)): a code (2 significant bits) times an E4M3 scale (4) has
at most 6, so that every dequantised weight is exactly a bf16 number. Source of the format: NVIDIA's NVFP4 (arXiv
2509.25149) and ModelOpt's checkpoint layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16
CODE_MAX = 6.0
SCALE_MIN, SCALE_MAX = 2.0**-9, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class NVFP4(NamedTuple):
    """A quantised matrix, or a stack of them.

    codes: uint8[..., K/2], two codes a byte, the even index in the low nibble (sign << 3 | magnitude index);
    scales: float8_e4m3fn[..., K/16]; scale2: float32[...], the global scale of each [N, K] matrix of the stack.
    """

    codes: Tensor
    scales: Tensor
    scale2: Tensor


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32[..., N, K/16, 16] and each block's largest magnitude. Raises ValueError for what NVFP4 cannot hold."""
    if weight.dim() < 2 or not weight.numel() or weight.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs [..., N, K] with K a multiple of {BLOCK}; got {list(weight.shape)}")
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    if not torch.isfinite(amax).all():
        raise ValueError(f"NVFP4 cannot hold infinities or NaN; the weight {list(weight.shape)} has some")
    return blocks, amax


def _global_scale(amax: Tensor) -> Tensor:
    """Block maxima float32[..., N, K/16] -> float32[..., 1, 1]: 2^ceil(log2(amax / 2688)), the smallest power of two
    under which every block scale fits E4M3; 1 for a zero matrix; not below 2^-116, where bf16 would lose bits."""
    amax = amax.amax(dim=(-2, -1), keepdim=True)
    mantissa, exponent = torch.frexp(amax / (CODE_MAX * SCALE_MAX))
    scale = torch.ldexp(torch.ones_like(amax), (exponent - (mantissa == 0.5).int()).clamp(min=-116))
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def _round(magnitude: Tensor) -> Tensor:
    """The nearest E2M1 magnitude, ties to the even code. The steps are 0.5 below 2, 1 below 4, 2 above: half of the
    power of two in the exponent bits."""
    step = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5).clamp_(0.5, 2.0)
    return (magnitude / step).round_().mul_(step).clamp_(max=CODE_MAX)


def _parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed E2M1 values float32[..., K/16, 16], E4M3 block scales [..., K/16], global scale float32[..., 1, 1]."""
    blocks, amax = _blocks(weight)
    scale2 = _global_scale(amax)
    scales = (amax / (CODE_MAX * scale2)).clamp_(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)
    scales = torch.where(amax > 0, scales, torch.ones_like(scales))
    ratio = blocks / (scales.float() * scale2).unsqueeze(-1)
    return _round(ratio.abs()).copysign_(ratio), scales, scale2


def quantize(weight: Tensor) -> NVFP4:
    """Quantise float [..., N, K], round to nearest even.

    Raises ValueError for K not a multiple of 16 and for infinities or NaN.
    """
    values, scales, scale2 = _parts(weight)
    magnitudes = torch.tensor(MAGNITUDES, device=weight.device)
    codes = torch.bucketize(values.abs(), magnitudes).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    codes = codes.flatten(-2)
    return NVFP4(codes[..., 0::2] | (codes[..., 1::2] << 4), scales, scale2[..., 0, 0])


def dequantize(quantised: NVFP4) -> Tensor:
    """float32[..., N, K], every value exactly representable in bf16 when the global scale is a power of two."""
    magnitudes = torch.tensor(MAGNITUDES, device=quantised.codes.device)
    table = torch.cat([magnitudes, -magnitudes])
    pairs = torch.stack([quantised.codes & 15, quantised.codes >> 4], dim=-1).flatten(-2)
    values = table[pairs.long()].unflatten(-1, (-1, BLOCK))
    result: Tensor = (values * (quantised.scales.float() * quantised.scale2[..., None, None]).unsqueeze(-1)).flatten(-2)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        values, scales, scale2 = _parts(weight)
        return (values * (scales.float() * scale2).unsqueeze(-1)).flatten(-2)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantize(weight: Tensor) -> Tensor:
    """dequantize(quantize(weight)), with the gradient passed straight through to `weight`. Raises as quantize."""
    result: Tensor = _StraightThrough.apply(weight)  # type: ignore[no-untyped-call]
    return result
