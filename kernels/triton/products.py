"""The inner loop of all products with NVFP4 weights: codes are unpacked in registers, exactly, as bf16 numbers."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from palaestra.kernels.triton.device import dot, power_of_two
from palaestra.kernels.triton.formats import E2M1_UNIT, E4M3_UNIT, e2m1, e4m3

VECTOR_ROWS = 4
"""Up to so many rows a product is multiplied and summed without tl.dot, whose tiles have at least 16 rows. With more
the arithmetic would take longer than the memory: 4.8 TB/s bring 8.5e12 weights a second, for which 16 rows need 2.7e14
operations, and such a device's float32 units make a quarter of that. An estimate, not a measurement."""
SMALLEST_DOT, LARGEST_DOT = 16, 64


class Tile(NamedTuple):
    """Rows of activations, rows of the weight and columns that a program takes at a time."""

    rows: int
    outputs: int
    columns: int
    vector: bool


def tile(rows: int) -> Tile:
    """The tile for a product with so many rows of activations."""
    if rows <= VECTOR_ROWS:
        padded = power_of_two(rows)
        return Tile(padded, 16, max(512 // padded, 64), True)
    return Tile(min(max(power_of_two(rows), SMALLEST_DOT), LARGEST_DOT), 64, 128, False)


@triton.jit
def unpack(code, scale):
    """Codes [n, k], scales float32 [n, k/8] -> float32 [n, k]."""
    spread = tl.reshape(e2m1(code), (scale.shape[0], scale.shape[1], 8)) * scale[:, :, None]
    return tl.reshape(spread, code.shape)


@triton.jit
def product(
    x, row, seen, codes, scales, output, N, K, first, last,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rows `row` of x [.., K], where `seen`, times rows `output` of NVFP4 [N, K] without its global scale, over the
    columns from `first` to `last` -> float32 [rows, outputs]. Even and odd columns are summed apart, as packed."""
    inside = output[:, None] < N
    acc = tl.zeros((row.shape[0], output.shape[0]), tl.float32)
    for start in range(first, last, COLUMNS):
        pair = start // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        block = start // 16 + tl.arange(0, COLUMNS // 16)[None, :]
        packed = tl.load(codes + output[:, None] * (K // 2) + pair, mask=inside & (pair < K // 2), other=0)
        scale = tl.load(scales + output[:, None] * (K // 16) + block, mask=inside & (block < K // 16), other=0)
        scale = e4m3(scale) * (E2M1_UNIT * E4M3_UNIT)
        at, there = x + row[:, None] * K + 2 * pair, seen[:, None] & (pair < K // 2)
        even, odd = tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)
        low, high = unpack(packed & 15, scale), unpack(packed >> 4, scale)
        if VECTOR:
            acc += tl.sum(even.to(tl.float32)[:, None, :] * low[None] + odd.to(tl.float32)[:, None, :] * high[None], 2)
        else:
            acc = dot(even, tl.trans(low), DOT, acc)
            acc = dot(odd, tl.trans(high), DOT, acc)
    return acc
