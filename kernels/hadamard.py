"""The random Hadamard transform in plain PyTorch: spreads outliers over a block before it is quantised.

Blocks of `size` values are multiplied by the orthonormal matrix diag(signs) H / sqrt(size), H being Sylvester's
Hadamard matrix. Applied to both factors along their common dimension it leaves a product as it was. Source: NVIDIA's
NVFP4 training recipe (arXiv 2509.25149), which uses size 16.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SIZES = (16, 32, 64, 128)


@functools.lru_cache(maxsize=16)
def matrix(size: int, seed: int = 0) -> Tensor:
    """float32[size, size]: diag(signs) H / sqrt(size), the signs drawn by `seed` (0: none). Its transpose is its
    inverse. Raises ValueError for a size that is none of SIZES."""
    if size not in SIZES:
        raise ValueError(f"the Hadamard transform has the sizes {', '.join(map(str, SIZES))}; got {size}")
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    signs = torch.ones(size)
    if seed:
        signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs[:, None] * found / math.sqrt(size)


def transform(x: Tensor, size: int = 16, seed: int = 0) -> Tensor:
    """Each `size` values along the last dimension transformed: float [..., K] -> the same shape and dtype.

    Raises ValueError for K not a multiple of `size`.
    """
    return _multiplied(x, matrix(size, seed))


def inverse(x: Tensor, size: int = 16, seed: int = 0) -> Tensor:
    """What `transform` makes `x` of. Raises as transform."""
    return _multiplied(x, matrix(size, seed).T)


def _multiplied(x: Tensor, by: Tensor) -> Tensor:
    if x.shape[-1] % len(by):
        raise ValueError(f"the Hadamard transform of size {len(by)} needs K a multiple of it; got {list(x.shape)}")
    blocks = x.unflatten(-1, (-1, len(by)))
    result: Tensor = (blocks @ by.to(x.device, x.dtype)).flatten(-2)
    return result
