"""One function an operation, wherever its tensors lie: Triton on a CUDA device, C on a CPU, else PyTorch.

Quantisation and Mamba-2 pick between C and PyTorch themselves (nvfp4.py, hadamard.py, mamba.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palaestra.kernels import attention, triton
from palaestra.kernels import experts as mixture
from palaestra.kernels import linear as products
from palaestra.kernels.attention import Pages
from palaestra.kernels.experts import Routing
from palaestra.kernels.fp8 import FP8
from palaestra.kernels.linear import Weight
from palaestra.kernels.native import TORCH, library
from palaestra.kernels.nvfp4 import NVFP4

TRITON = "triton"


def kernels_for(device: torch.device) -> str:
    """What computes there: `triton`, a tier of the C library, or `torch`."""
    if triton.available() and (device.type == "cuda" or triton.interpreted()):
        return TRITON
    native = library() if device.type == "cpu" else None
    return TORCH if native is None else native.tier


@dataclass(frozen=True)
class Prepared:
    """An operation over weights that were laid out for it; `kernels`: what computes it, as kernels_for says."""

    kernels: str
    run: Callable[..., Tensor]

    def __call__(self, *given: Tensor) -> Tensor:
        """The result, in the dtype of the first tensor."""
        return self.run(*given).to(given[0].dtype)


def linear(weight: Weight) -> Prepared:
    """x W^T: float [..., K] -> [..., N], for a weight [N, K] in NVFP4, FP8, float32 or bf16."""
    kernels = kernels_for(_device(weight))
    if kernels == TRITON and isinstance(weight, NVFP4):
        from palaestra.kernels.triton.linear import linear as on_device

        return Prepared(TRITON, lambda x: on_device(x, weight))
    native = library()
    if native is None or kernels in (TRITON, TORCH):
        return Prepared(TORCH, lambda x: products.linear_plain(x, weight))
    packed = products.pack(native, weight)
    return Prepared(kernels, lambda x: products.linear(native, x, packed, torch.get_num_threads()))


def experts(up: NVFP4, down: NVFP4) -> Prepared:
    """The weighted sums of chosen experts, each down(relu(up(x))^2): x float [T, width], chosen int64[T, k], weights
    float[T, k] -> [T, width], for stacks up [E, inner, width] and down [E, width, inner]."""
    kernels = kernels_for(up.codes.device)
    if kernels == TRITON:
        from palaestra.kernels.triton.experts import experts as on_device

        return Prepared(TRITON, lambda x, chosen, weights: on_device(x, up, down, chosen, weights))
    pairs = [(NVFP4(*a), NVFP4(*b)) for a, b in zip(zip(*up, strict=True), zip(*down, strict=True), strict=True)]
    native = library()
    if native is None or kernels == TORCH:
        return Prepared(TORCH, lambda x, chosen, weights: mixture.experts_plain(x, chosen, weights, pairs))
    packed = mixture.pack_experts(native, pairs)
    return Prepared(
        kernels,
        lambda x, chosen, weights: mixture.experts(native, x, chosen, weights, packed, torch.get_num_threads()),
    )


def route(logits: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The gate's outputs float32[T, E] and the correction bias float32[E] -> the chosen experts int64[T, top], the best
    first, and their weights float32[T, top]."""
    kernels, native = kernels_for(logits.device), library()
    if kernels == TRITON:
        from palaestra.kernels.triton.experts import route as on_device

        return on_device(logits, bias, routing)
    if native is None or kernels == TORCH:
        return mixture.route_plain(logits, bias, routing)
    return mixture.route(native, logits, bias, routing)


def attend(q: Tensor, pages: Pages, lengths: Tensor) -> Tensor:
    """softmax(q k / sqrt(dim)) v over each conversation's first `lengths` int64[B] tokens: q float [B, heads, dim] ->
    the same."""
    kernels, native = kernels_for(q.device), library()
    if kernels == TRITON:
        from palaestra.kernels.triton.attention import attend as on_device

        return on_device(q, pages, lengths)
    if native is None or kernels == TORCH:
        return attention.attend_plain(q, pages, lengths)
    return attention.attend(native, q, pages, lengths, torch.get_num_threads()).to(q.dtype)


def _device(weight: Weight) -> torch.device:
    if isinstance(weight, NVFP4):
        return weight.codes.device
    return (weight.values if isinstance(weight, FP8) else weight).device
