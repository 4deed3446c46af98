"""The product of two NVFP4 matrices through the tensor cores' own path, on devices of compute capability 10.x.

It cannot be run without such a device, in the interpreter neither: no test of values exists. The tests compile it and
find the hardware's block-scaled instruction in what comes out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.nvfp4 import NVFP4

ROWS, OUTPUTS, COLUMNS = 128, 128, 256
CAPABILITY = 10


def supported(device: torch.device) -> bool:
    """Whether the device multiplies NVFP4 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == CAPABILITY


def linear(x: NVFP4, weight: NVFP4) -> Tensor:
    """x W^T: NVFP4 [M, K] and [N, K] -> bf16[M, N], summed in float32. The plain version is the product of the two
    dequantised. Raises RuntimeError on another device and ValueError for another K."""
    if not supported(x.codes.device):
        raise RuntimeError(f"products of two NVFP4 matrices need compute capability {CAPABILITY}.x")
    rows, outputs, columns = len(x.codes), len(weight.codes), weight.codes.shape[1] * 2
    if x.codes.shape[1] * 2 != columns:
        raise ValueError(f"a weight of {columns} columns, and activations of {x.codes.shape[1] * 2}")
    y = torch.empty(rows, outputs, dtype=torch.bfloat16, device=x.codes.device)
    _product[triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS)](
        x.codes.contiguous(), x.scales.contiguous(), x.scale2, weight.codes.contiguous(), weight.scales.contiguous(),
        weight.scale2, y, rows, outputs, columns, ROWS=ROWS, OUTPUTS=OUTPUTS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


@triton.jit
def _product(
    x, x_scales, x_scale2, codes, scales, scale2, y, M, N, K,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, K, COLUMNS):
        pair = start // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        block = start // 16 + tl.arange(0, COLUMNS // 16)[None, :]
        seen, inside = (row < M)[:, None], (output < N)[:, None]
        left = tl.load(x + row[:, None] * (K // 2) + pair, mask=seen & (pair < K // 2), other=0)
        right = tl.load(codes + output[:, None] * (K // 2) + pair, mask=inside & (pair < K // 2), other=0)
        left_scale = tl.load(x_scales + row[:, None] * (K // 16) + block, mask=seen & (block < K // 16), other=0.0)
        right_scale = tl.load(scales + output[:, None] * (K // 16) + block, mask=inside & (block < K // 16), other=0.0)
        acc = tl.dot_scaled(left, left_scale, "e2m1", tl.trans(right), right_scale, "e2m1", acc)
    acc *= tl.load(x_scale2) * tl.load(scale2)
    at = y + row[:, None] * N + output[None, :]
    tl.store(at, acc, mask=(row < M)[:, None] & (output < N)[None, :])
