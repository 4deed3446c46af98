"""The random Hadamard transform: spreads outliers over a block before it is quantised.

Blocks of `size` values are multiplied by the orthonormal matrix diag(signs) H / sqrt(size), H being Sylvester's
Hadamard matrix. Applied to both factors along their common dimension it leaves a product as it was. Source: NVIDIA's
NVFP4 training recipe (arXiv 2509.25149), which uses size 16.

What everybody calls is registered with torch as `palaestra::hadamard`: float32 on the CPU is transformed in C where
that was built (cpu/quantize.h), everything else by `transform_plain`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from palaestra.kernels.native import Library, Rotation, library, pointer
from palaestra.kernels.registered import differentiate, register

SIZES = (16, 32, 64, 128)


def transform(x: Tensor, size: int = 16, seed: int = 0) -> Tensor:
    """Each `size` values along the last dimension transformed: float [..., K] -> the same shape and dtype.

    The signs are drawn by `seed` (0: none). Raises ValueError for a size that is none of SIZES and for K not a multiple
    of it.
    """
    result: Tensor = hadamard_op(x, size, seed, False)
    return result


def inverse(x: Tensor, size: int = 16, seed: int = 0) -> Tensor:
    """What `transform` makes `x` of. Raises as transform."""
    result: Tensor = hadamard_op(x, size, seed, True)
    return result


def transform_plain(x: Tensor, size: int = 16, seed: int = 0, inverse: bool = False) -> Tensor:
    """What `transform` and `inverse` compute, in plain PyTorch, in the dtype of `x`."""
    check(x, size)
    by = matrix(size, seed).to(x.device, x.dtype)
    result: Tensor = (x.unflatten(-1, (-1, size)) @ (by.T if inverse else by)).flatten(-2)
    return result


@functools.lru_cache(maxsize=16)
def matrix(size: int, seed: int = 0) -> Tensor:
    """float32[size, size], of one of SIZES: diag(signs) H / sqrt(size). Its transpose is its inverse."""
    found = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return signs(size, seed)[:, None] * found / math.sqrt(size)


@functools.lru_cache(maxsize=16)
def signs(size: int, seed: int = 0) -> Tensor:
    """float32[size] of 1 and -1, drawn by `seed` (0: all 1)."""
    if not seed:
        return torch.ones(size, dtype=torch.float32, device="cpu")
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.float32) * 2 - 1


def check(x: Tensor, size: int) -> None:
    """Raises ValueError as transform."""
    if size not in SIZES:
        raise ValueError(f"the Hadamard transform has the sizes {', '.join(map(str, SIZES))}; got {size}")
    if x.shape[-1] % size:
        raise ValueError(f"the Hadamard transform of size {size} needs K a multiple of it; got {list(x.shape)}")


def _native(native: Library, x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    check(x, size)
    x, y, signed = x.contiguous(), x.new_empty(x.shape), signs(size, seed)
    rotation = Rotation(pointer(signed), size, inverse)
    native.transform(ctypes.byref(rotation), pointer(x), pointer(y), x.numel(), torch.get_num_threads())
    return y


# -- what torch knows of it


def _hadamard(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    native = library() if x.device.type == "cpu" and x.dtype == torch.float32 else None
    return transform_plain(x, size, seed, inverse) if native is None else _native(native, x, size, seed, inverse)


def _room(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    check(x, size)
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    size, seed, inverse = ctx.how
    return hadamard_op(gradient, size, seed, not inverse), None, None, None


hadamard_op = register("hadamard", _hadamard, _room, "(Tensor x, int size, int seed, bool inverse) -> Tensor")
differentiate(hadamard_op, _backward, _remember)
