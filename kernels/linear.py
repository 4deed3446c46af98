"""y = x W^T for few rows of x: weights packed once into tiles, then read once a product, on the CPU in C."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from palaestra.kernels import fp8, native, nvfp4
from palaestra.kernels.fp8 import FP8
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import KINDS, TILE, Library, Matrix, floats, pointer
from palaestra.kernels.nvfp4 import NVFP4

Weight = NVFP4 | FP8 | Tensor
"""[N, K]: NVFP4, FP8, float32 or bf16."""

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
"""Of weights that are not NVFP4."""


@dataclass(frozen=True)
class Packed:
    """A weight [rows, columns] in tiles of 16 rows. `record` points into `tensors`, which hold the weight."""

    record: Matrix
    tensors: tuple[Tensor, ...]
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack(library: Library, weight: Weight, arena: Arena | None = None) -> Packed:
    """Pack [N, K] for `linear`, into an arena of many weights or one of its own.

    Raises ValueError for a dtype that has no kernel, and for negative block scales.
    """
    arena = arena or Arena()
    if isinstance(weight, NVFP4):
        return _pack_nvfp4(library, weight, arena)
    values, scale = (weight.values, float(weight.scale)) if isinstance(weight, FP8) else (weight.detach(), 1.0)
    if values.dtype not in DTYPES:
        raise ValueError(f"a weight is NVFP4, FP8, float32 or bf16; got {values.dtype}")
    rows, columns = values.shape
    values = values.contiguous()
    tiles = arena.zeros((-(-rows // TILE), columns, TILE), values.dtype)
    library.pack(pointer(values), rows, columns, values.element_size(), pointer(tiles))
    record = Matrix(pointer(tiles), None, scale, KINDS[values.dtype], len(tiles), columns)
    return Packed(record, (tiles,), rows, columns)


def _pack_nvfp4(library: Library, weight: NVFP4, arena: Arena) -> Packed:
    rows, columns = weight.codes.shape[0], weight.codes.shape[1] * 2
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    if (scales.view(torch.uint8) >= 0x80).any():
        raise ValueError(f"an NVFP4 weight of {rows}x{columns} has negative block scales")
    tiles = -(-rows // TILE)
    words = arena.zeros((tiles, columns // nvfp4.BLOCK, 2, TILE), torch.int32)
    steps = arena.zeros((tiles, columns // nvfp4.BLOCK, TILE), torch.uint8)
    library.pack_nvfp4(pointer(codes), pointer(scales), rows, columns, pointer(words), pointer(steps))
    record = Matrix(pointer(words), pointer(steps), float(weight.scale2), native.NVFP4, tiles, columns)
    return Packed(record, (words, steps), rows, columns)


def linear(library: Library, x: Tensor, weight: Packed, threads: int = 1, int8: bool = False) -> Tensor:
    """float [..., K] and a packed [N, K] -> float32 [..., N], bf16 activations as they are and others as float32.

    `int8`: with activations rounded to int8, a scale for 64 of a row (NVFP4 weights alone); where all of those are
    below 1e-36 they are 0. Raises ValueError for another K and for int8 with other weights.
    """
    if x.shape[-1] != weight.columns:
        raise ValueError(f"a weight of {weight.columns} columns, and activations of {x.shape[-1]}")
    if int8 and weight.record.kind != native.NVFP4:
        raise ValueError("int8 activations need an NVFP4 weight")
    x = x.detach() if x.dtype == torch.bfloat16 and not int8 else x.detach().float()
    flat = x.reshape(-1, weight.columns).contiguous()
    y = floats(len(flat), weight.record.tiles * TILE)
    kind = native.INT8 if int8 else KINDS[flat.dtype]
    if library.multiply(ctypes.byref(weight.record), pointer(flat), kind, len(flat), pointer(y), threads):
        raise MemoryError(f"no memory for a product with {len(flat)} rows of {weight.columns}")
    return y[:, : weight.rows].reshape(*x.shape[:-1], weight.rows)


def linear_plain(x: Tensor, weight: Weight) -> Tensor:
    """What `linear` computes, in PyTorch."""
    if isinstance(weight, NVFP4):
        weight = nvfp4.dequantize(weight)
    elif isinstance(weight, FP8):
        weight = fp8.dequantize(weight)
    return torch.nn.functional.linear(x.float(), weight.float())
