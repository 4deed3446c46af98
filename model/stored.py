"""Weights as checkpoints keep them, some in several tensors: plain ones, FP8, and NVFP4 in the layouts of ModelOpt and
compressed-tensors. Names are those of the plain weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from palaestra.kernels import fp8, nvfp4
from palaestra.kernels.fp8 import FP8
from palaestra.kernels.layouts import GLOBAL, PACKED, SCALE, SCALE2, from_compressed, from_modelopt, to_modelopt
from palaestra.kernels.linear import Weight
from palaestra.kernels.nvfp4 import NVFP4
from palaestra.model.shards import CheckpointError, Shards

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are their own numbers."""
ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
"""Scales of activations and caches, which weights do without."""


Tensors = Mapping[str, Tensor]
"""Of a checkpoint's files, or as weights are published."""


def names(tensors: Tensors) -> Iterator[str]:
    """The weights among them."""
    for name in tensors:
        if name.endswith(PACKED):
            yield name.removesuffix(PACKED)
        elif not name.endswith((*ACTIVATIONS, f"weight{SCALE}", f"weight{SCALE2}", f"weight{GLOBAL}")):
            yield name


def weight(tensors: Tensors, name: str) -> Weight:
    """One of them, as it is kept. Raises CheckpointError naming a part that is missing, misshapen or too much."""
    packed = f"{name}{PACKED}"
    if packed in tensors:
        _check(tensors, packed, {f"{name}{SCALE}", f"{name}{GLOBAL}"}, f"{name}{GLOBAL}")
        return _fitting(tensors, packed, from_compressed(name, tensors))
    tensor = tensors[name]
    if tensor.dtype == torch.uint8:
        _check(tensors, name, {f"{name}{SCALE}", f"{name}{SCALE2}"}, f"{name}{SCALE2}")
        return _fitting(tensors, name, from_modelopt(name, tensors))
    if tensor.dtype == torch.float8_e4m3fn:
        _check(tensors, name, {f"{name}{SCALE}"}, f"{name}{SCALE}")
        return FP8(tensor, tensors[f"{name}{SCALE}"].float().reshape(()))
    if tensor.dtype not in PLAIN:
        raise CheckpointError(f"{_place(tensors, name)}: {name} is {tensor.dtype}, which no weight is kept in")
    _check(tensors, name, set())
    return tensor


def tensors_of(name: str, kept: Weight) -> dict[str, Tensor]:
    """A weight in the layout of ModelOpt: what `weight` reads."""
    if isinstance(kept, NVFP4):
        return to_modelopt(name, kept)
    return {name: kept.values, f"{name}{SCALE}": kept.scale} if isinstance(kept, FP8) else {name: kept}


def shape(kept: Weight) -> list[int]:
    """Of its numbers."""
    if isinstance(kept, NVFP4):
        return [*kept.codes.shape[:-1], 2 * kept.codes.shape[-1]]
    return list(kept.values.shape if isinstance(kept, FP8) else kept.shape)


def values(kept: Weight) -> Tensor:
    """Its numbers: float32, or a plain weight's own dtype."""
    if isinstance(kept, NVFP4):
        return nvfp4.dequantize(kept)
    return fp8.dequantize(kept) if isinstance(kept, FP8) else kept


def _check(tensors: Tensors, name: str, parts: set[str], single: str = "") -> None:
    """Whether a weight has just the parts of its kind, and one global scale."""
    stem = name.removesuffix(PACKED)
    others = {stem, *(stem + end for end in (PACKED, SCALE, SCALE2, GLOBAL))} - {name}
    found = {part for part in others if part in tensors}
    if found != parts:
        part = min(found ^ parts)
        trouble = "no" if part in parts else "a strange"
        raise CheckpointError(f"{_place(tensors, name)}: {name} has {trouble} {part}; fetch the folder anew")
    if single and tensors[single].numel() != 1:
        raise CheckpointError(
            f"{_place(tensors, single)}: {single} has {list(tensors[single].shape)} numbers, and one is read"
        )


def _fitting(tensors: Tensors, name: str, found: NVFP4) -> NVFP4:
    rows, halves = found.codes.shape if found.codes.dim() == 2 else (-1, -1)
    if found.scales.shape != (rows, halves * 2 // nvfp4.BLOCK):
        raise CheckpointError(
            f"{_place(tensors, name)}: {name} is {list(found.codes.shape)} with {list(found.scales.shape)} block "
            f"scales; NVFP4 has one for {nvfp4.BLOCK} values of a row"
        )
    return found


def _place(tensors: Tensors, name: str) -> str:
    return str(tensors.path(name)) if isinstance(tensors, Shards) else "the published weights"
