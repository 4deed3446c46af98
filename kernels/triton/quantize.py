"""NVFP4 quantisation and the random Hadamard transform, alone or one before the other.

The plain versions are kernels/nvfp4.py (the rule `max`) and kernels/hadamard.py. Rounded to nearest, the codes and
scales are the plain ones bit for bit. After a transform they are those of the transformed values in the dtype of the
input, which are summed in another order than the plain ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels import hadamard, nvfp4_plain
from palaestra.kernels.nvfp4 import BLOCK, NVFP4
from palaestra.kernels.triton.device import dot, dot_type, require
from palaestra.kernels.triton.formats import (
    E4M3_UNIT,
    binade,
    e4m3,
    logarithm,
    nearest,
    stochastic,
    to_e4m3,
)

GROUPS = 16
"""Groups of values that a program takes: blocks of 16, or of the transform's size."""
DTYPES = (torch.float32, torch.bfloat16)


class Hadamard(NamedTuple):
    """The transform diag(signs) H / sqrt(size), the signs drawn by `seed` (0: none), as kernels/hadamard.py has it."""

    size: int = 16
    seed: int = 0


def transform(x: Tensor, rotation: Hadamard) -> Tensor:
    """Each `size` values along the last dimension transformed: float32 or bf16 [..., K] -> the same shape and dtype,
    summed in float32. Raises ValueError for another dtype or size and for K not a multiple of the size."""
    values, signs = _rotated(x, rotation)
    y = torch.empty_like(values)
    _transform[_grid(values, rotation.size)](
        values, signs, y, len(values) // rotation.size, rotation.size**-0.5,
        SIZE=rotation.size, GROUPS=GROUPS, DOT=dot_type(x),
    )  # fmt: skip
    return y.view_as(x)


def quantize(weight: Tensor, square: bool = False, seed: int | None = None, rotation: Hadamard | None = None) -> NVFP4:
    """Quantise float32 or bf16 [..., N, K] under the rule `max`, as nvfp4.quantize does.

    `square`: one scale for 16 x 16 values; `seed`: round stochastically, with Philox numbers from this seed (None: to
    nearest even); `rotation`: transform along K before. Raises ValueError as nvfp4.quantize, and as `transform`.
    """
    require(weight, *DTYPES)
    nvfp4_plain.check(weight, nvfp4_plain.Recipe(square=square))
    size = rotation.size if rotation else BLOCK
    values, signs = _rotated(weight, rotation) if rotation else (weight.contiguous().flatten(), weight)
    groups, grid = len(values) // size, _grid(values, size)
    options = {"SIZE": size, "GROUPS": GROUPS, "ROTATE": rotation is not None, "DOT": dot_type(weight)}
    blocks = (*weight.shape[:-1], weight.shape[-1] // BLOCK)
    amax = torch.empty(blocks, device=weight.device)
    _largest[grid](values, signs, amax, groups, size**-0.5, **options)
    if not torch.isfinite(amax).all():
        raise nvfp4_plain.not_finite(weight)
    if square:
        amax = nvfp4_plain.over_squares(amax, torch.amax).contiguous()
    scale2 = nvfp4_plain.global_scale(amax, nvfp4_plain.SCALE_MAX)[..., 0, 0].contiguous()
    codes = torch.empty(*weight.shape[:-1], weight.shape[-1] // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=weight.device)
    _encode[grid](
        values, signs, amax, scale2, codes, scales, groups, size**-0.5, blocks[-2] * blocks[-1], seed or 0,
        STOCHASTIC=seed is not None, **options,
    )  # fmt: skip
    return NVFP4(codes, scales.view(torch.float8_e4m3fn), scale2)


def _grid(values: Tensor, size: int) -> tuple[int]:
    return (triton.cdiv(len(values), size * GROUPS),)


def _rotated(x: Tensor, rotation: Hadamard) -> tuple[Tensor, Tensor]:
    """The values in a row, and the transform's signs [size, size] in the dtype of `x`, where they are exact."""
    require(x, *DTYPES)
    matrix = hadamard.matrix(*rotation)
    if x.shape[-1] % rotation.size:
        raise ValueError(
            f"the Hadamard transform of size {rotation.size} needs K a multiple of it; got {list(x.shape)}"
        )
    return x.contiguous().flatten(), torch.sign(matrix).to(x)


@triton.jit
def _load(x, signs, groups, factor, SIZE: tl.constexpr, GROUPS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr):
    """This program's values, transformed if ROTATE, rounded to their dtype: float32 [GROUPS, SIZE]; zeros beyond."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)
    values = tl.load(x + group[:, None] * SIZE + column[None, :], mask=(group < groups)[:, None], other=0.0)
    if ROTATE:
        by = tl.load(signs + column[:, None] * SIZE + column[None, :])
        turned = dot(values, by, DOT) * factor
        values = turned.to(x.dtype.element_ty)
    return values.to(tl.float32)


@triton.jit
def _transform(x, signs, y, groups, factor, SIZE: tl.constexpr, GROUPS: tl.constexpr, DOT: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = y + group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(at, _load(x, signs, groups, factor, SIZE, GROUPS, True, DOT), mask=(group < groups)[:, None])


@triton.jit
def _largest(
    x, signs, amax, groups, factor,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of each 16 values; infinity where one is NaN."""
    values = tl.abs(_load(x, signs, groups, factor, SIZE, GROUPS, ROTATE, DOT))
    values = tl.where(values == values, values, float("inf"))
    block = tl.program_id(0).to(tl.int64) * (GROUPS * SIZE // 16) + tl.arange(0, GROUPS * SIZE // 16)
    tl.store(amax + block, tl.max(tl.reshape(values, (GROUPS * SIZE // 16, 16)), 1), mask=block < groups * (SIZE // 16))


@triton.jit(do_not_specialize=["seed"])
def _encode(
    x, signs, amax, scale2, codes, scales, groups, factor, blocks, seed,
    STOCHASTIC: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, ROTATE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Codes and scales, given the blocks' largest magnitudes; `blocks`: how many share a global scale."""
    COUNT: tl.constexpr = GROUPS * SIZE // 16
    values = tl.reshape(_load(x, signs, groups, factor, SIZE, GROUPS, ROTATE, DOT), (COUNT, 16))
    block = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    real = block < groups * (SIZE // 16)
    largest = tl.load(amax + block, mask=real, other=0.0)
    whole = tl.load(scale2 + block // blocks, mask=real, other=1.0)
    ideal = tl.minimum(tl.maximum(tl.div_rn(largest, 6.0 * whole), 2.0**-9), 448.0)
    scale = to_e4m3(ideal)
    if STOCHASTIC:  # upwards: nothing may be cut off at 6
        scale += (e4m3(scale) * E4M3_UNIT < ideal).to(tl.int32)
    scale = tl.where(largest > 0, scale, 0x38)
    tl.store(scales + block, scale.to(tl.uint8), mask=real)

    ratio = tl.div_rn(tl.abs(values), (e4m3(scale) * E4M3_UNIT * whole)[:, None] + tl.zeros_like(values))
    step = tl.minimum(tl.maximum(binade(ratio) * 0.5, 0.5), 2.0)
    steps = tl.div_rn(ratio, step)
    place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    rounded = stochastic(steps, seed, place) if STOCHASTIC else nearest(steps)
    code = tl.minimum(rounded.to(tl.int32) + (logarithm(step) + 1) * 2, 7)
    code |= (values.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split(tl.reshape(code, (COUNT, 8, 2)))
    at = codes + block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(at, (low | (high << 4)).to(tl.uint8), mask=real[:, None])
