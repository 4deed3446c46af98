"""The kernels in Triton, for CUDA devices. `available` says whether they can run; the other files need triton."""

from __future__ import annotations

import importlib.util
import os

import torch


def available() -> bool:
    """Whether triton is installed and there is something to run it on: a CUDA device, or TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or interpreted()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
