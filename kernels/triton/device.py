"""What a launch needs to know of the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PROCESSORS_WITHOUT_DEVICE = 4
"""Small, so that the interpreter runs few programs and still splits sums."""


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type != "cuda":
        return PROCESSORS_WITHOUT_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_type(*factors: Tensor) -> Any:
    """In which type tensors enter a product: float32 if one of them is float32, else bf16."""
    return tl.float32 if any(factor.dtype == torch.float32 for factor in factors) else tl.bfloat16


@triton.jit
def dot(left, right, TYPE: tl.constexpr, acc=None):
    """left right + acc, float32, of operands rounded to TYPE.

    The interpreter's tl.dot knows no bf16. float32 asks for `tf32x3`, three products of TF32 parts: under `ieee` Triton
    3.7 compiles a plain TF32 product for compute capability 10.0.
    """
    left, right = left.to(TYPE), right.to(TYPE)
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32x3")


def power_of_two(count: int) -> int:
    """The smallest that is not below, as tl.arange needs."""
    return 1 << (count - 1).bit_length()


def require(x: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `x` is of one of the dtypes."""
    if x.dtype not in dtypes:
        raise ValueError(f"the kernel takes {' or '.join(map(str, dtypes))}; got {x.dtype}")
