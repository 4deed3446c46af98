"""Weights as checkpoints keep them, some in several tensors: plain ones, FP8, and NVFP4 in the layouts of ModelOpt and
compressed-tensors. Names are those of the plain weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from palaestra.kernels import fp8, nvfp4
from palaestra.kernels.fp8 import FP8
from palaestra.kernels.layouts import GLOBAL, PACKED, SCALE, SCALE2, from_compressed
from palaestra.kernels.linear import Weight
from palaestra.kernels.nvfp4 import NVFP4
from palaestra.model.shards import CheckpointError, Shards

ACTIVATIONS = (".input_scale", "_input_global_scale", ".input_global_scale", ".k_scale", ".v_scale")
"""Scales of activations and caches, which weights do without."""


def names(shards: Shards) -> Iterator[str]:
    """The weights of a folder."""
    for name in shards:
        if name.endswith(PACKED):
            yield name.removesuffix(PACKED)
        elif not name.endswith((*ACTIVATIONS, f"weight{SCALE}", f"weight{SCALE2}", f"weight{GLOBAL}")):
            yield name


def weight(shards: Shards, name: str) -> Weight:
    """One of them, as it is kept. Raises CheckpointError naming a part that is missing or misshapen."""
    if name not in shards:
        packed = f"{name}{PACKED}"
        parts = {part: shards[part] for part in (packed, *_parts(shards, packed, f"{name}{SCALE}", f"{name}{GLOBAL}"))}
        return _fitting(shards, packed, from_compressed(name, parts))
    tensor = shards[name]
    if tensor.dtype == torch.uint8:
        scales, scale2 = _parts(shards, name, f"{name}{SCALE}", f"{name}{SCALE2}")
        return _fitting(shards, name, NVFP4(tensor, shards[scales], shards[scale2].float().reshape(())))
    if tensor.dtype == torch.float8_e4m3fn:
        (scale,) = _parts(shards, name, f"{name}{SCALE}")
        if shards[scale].numel() != 1:
            raise CheckpointError(
                f"{shards.path(scale)}: {scale} has {list(shards[scale].shape)} scales; FP8 weights with one are read"
            )
        return FP8(tensor, shards[scale].float().reshape(()))
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{shards.path(name)}: {name} is {tensor.dtype}, which no weight is kept in")
    return tensor


def values(kept: Weight) -> Tensor:
    """Its numbers: float32, or a plain weight's own dtype."""
    if isinstance(kept, NVFP4):
        return nvfp4.dequantize(kept)
    return fp8.dequantize(kept) if isinstance(kept, FP8) else kept


def _parts(shards: Shards, name: str, *parts: str) -> tuple[str, ...]:
    for part in parts:
        if part not in shards:
            raise CheckpointError(f"{shards.path(name)}: {name} has no {part}; fetch the folder anew")
    return parts


def _fitting(shards: Shards, name: str, found: NVFP4) -> NVFP4:
    rows, halves = found.codes.shape if found.codes.dim() == 2 else (-1, -1)
    if found.scales.shape != (rows, halves * 2 // nvfp4.BLOCK):
        raise CheckpointError(
            f"{shards.path(name)}: {name} is {list(found.codes.shape)} with {list(found.scales.shape)} block scales; "
            f"NVFP4 has one for {nvfp4.BLOCK} values of a row"
        )
    return found
