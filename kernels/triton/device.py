"""What a launch needs to know of the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
PROCESSORS_WITHOUT_DEVICE = 4
"""Small, so that the interpreter runs few programs and still splits sums."""


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type != "cuda":
        return PROCESSORS_WITHOUT_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_type(x: Tensor) -> Any:
    """In which type `x` enters tl.dot: bf16 if it is bf16, else float32. The interpreter's tl.dot knows no bf16.

    Products of float32 ask for `tf32x3`, three products of TF32 parts: under `ieee` Triton 3.7 compiles a plain TF32
    product for compute capability 10.0."""
    return tl.bfloat16 if x.dtype == torch.bfloat16 and not INTERPRETED else tl.float32


def power_of_two(count: int) -> int:
    """The smallest that is not below, as tl.arange needs."""
    return 1 << (count - 1).bit_length()


def require(x: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `x` is of one of the dtypes."""
    if x.dtype not in dtypes:
        raise ValueError(f"the kernel takes {' or '.join(map(str, dtypes))}; got {x.dtype}")
