"""y = x W^T with NVFP4 weights. The plain version is kernels/linear.py's linear_plain."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.nvfp4 import NVFP4
from palaestra.kernels.triton.device import dot_type, processors, require
from palaestra.kernels.triton.products import product, tile

PROGRAMS_A_PROCESSOR = 2


def linear(x: Tensor, weight: NVFP4) -> Tensor:
    """bf16 or float32 [..., K] and NVFP4 [N, K] -> [..., N] in the dtype of `x`, summed in float32.

    Meant for 1 to 64 rows; more are computed 64 at a time, the weight read anew for each. Where the rows of the weight
    alone make too few programs for the device, the columns are split too, and the parts added in a fixed order.
    Raises ValueError for another dtype or K.
    """
    require(x, torch.bfloat16, torch.float32)
    outputs, columns = weight.codes.shape[0], weight.codes.shape[1] * 2
    if x.shape[-1] != columns:
        raise ValueError(f"a weight of {columns} columns, and activations of {x.shape[-1]}")
    flat = x.reshape(-1, columns).contiguous()
    if not len(flat):
        return x.new_empty(*x.shape[:-1], outputs)
    block = tile(len(flat))
    grid = (triton.cdiv(outputs, block.outputs), triton.cdiv(len(flat), block.rows))
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * processors(x.device), grid[0] * grid[1])
    blocks = triton.cdiv(columns, block.columns)
    share = triton.cdiv(blocks, min(wanted, blocks)) * block.columns
    parts = triton.cdiv(columns, share)
    y = torch.empty(parts, len(flat), outputs, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    _linear[*grid, parts](
        flat, weight.codes.contiguous(), weight.scales.contiguous().view(torch.uint8), weight.scale2, y,
        len(flat), outputs, columns, share,
        ROWS=block.rows, OUTPUTS=block.outputs, COLUMNS=block.columns, VECTOR=block.vector, DOT=dot_type(x),
    )  # fmt: skip
    total = y[0] if parts == 1 else y.sum(0).to(x.dtype)
    return total.view(*x.shape[:-1], outputs)


@triton.jit
def _linear(
    x, codes, scales, scale2, y, rows, N, K, share,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    first, last = part * share, tl.minimum((part + 1) * share, K)
    acc = product(x, row, row < rows, codes, scales, output, N, K, first, last, COLUMNS, VECTOR, DOT)
    at = y + (part * rows + row[:, None]) * N + output[None, :]
    tl.store(at, acc * tl.load(scale2), mask=(row < rows)[:, None] & (output < N)[None, :])
