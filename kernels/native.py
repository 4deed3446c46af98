"""The C library: found beside this file if a compiler was there when the package was built, called through ctypes.

It has a tier of code for each set of instructions and takes the best that the machine has. PALAESTRA_KERNELS names one
(`avx512bf16`, `avx512`, `avx2`, `portable`), or `torch`: none, everything in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_long, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "PALAESTRA_KERNELS"
TORCH = "torch"
FILE = Path(__file__).parent / "_cpu.so"
TILE = 16
"""Rows of a packed matrix that lie side by side."""
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3, torch.float16: 5}
NVFP4, INT8 = 0, 4
"""`enum kind` of cpu/records.h."""


class Matrix(Structure):
    """`struct matrix` of cpu/records.h, as are those below."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("scale", c_float),
        ("kind", c_int32),
        ("tiles", c_int32),
        ("columns", c_int32),
    )


class Mamba(Structure):
    """The parts of a Mamba-2 mixer."""

    _fields_ = (
        ("into", Matrix),
        ("out", Matrix),
        *((name, c_void_p) for name in ("conv", "conv_bias", "dt_bias", "a", "d", "norm")),
        *((name, c_int32) for name in ("heads", "dim", "state", "groups", "kernel")),
        ("dt_min", c_float),
    )


class Attention(Structure):
    """The parts of an attention mixer."""

    _fields_ = (("qkv", Matrix), ("out", Matrix), ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32))


class MLP(Structure):
    """The parts of an MLP, or of an expert."""

    _fields_ = (("up", Matrix), ("down", Matrix))


class MoE(Structure):
    """The parts of a mixture of experts."""

    _fields_ = (
        *((name, Matrix) for name in ("gate", "into", "back")),
        ("experts", POINTER(MLP)),
        ("shared", MLP),
        ("bias", c_void_p),
        *((name, c_int32) for name in ("count", "top", "groups", "top_groups", "normalise")),
        ("factor", c_float),
    )


class Layer(Structure):
    """One layer: its letter, norm and mixer."""

    _fields_ = (("letter", c_int32), ("norm", c_void_p), ("mixer", c_void_p))


class Model(Structure):
    """A whole model."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embeddings", c_void_p),
        ("norm", c_void_p),
        ("head", Matrix),
        ("count", c_int32),
        ("hidden", c_int32),
        ("eps", c_float),
    )


class Past(Structure):
    """What one layer keeps of all conversations."""

    _fields_ = (("first", c_void_p), ("second", c_void_p))


class Cache(Structure):
    """What all layers keep."""

    _fields_ = (("layers", POINTER(Past)), ("capacity", c_int64))


class Pages(Structure):
    """Keys and values of many conversations."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "table")),
        *((name, c_int64) for name in ("stride", "tokens")),
        *((name, c_float) for name in ("key_scale", "value_scale")),
        *((name, c_int32) for name in ("kind", "heads", "kv_heads", "dim")),
    )


class Batch(Structure):
    """Tokens of conversations."""

    _fields_ = (
        *((name, c_void_p) for name in ("ids", "rows", "lengths", "wanted", "logits")),
        ("count", c_int64),
        ("stride", c_int64),
    )


class Rotation(Structure):
    """A random Hadamard transform, or its inverse."""

    _fields_ = (("signs", c_void_p), ("size", c_int32), ("inverse", c_int32))


class Quantising(Structure):
    """A stack of matrices, how to quantise it, and room for what is made of it."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "multiples", "scale2", "values", "codes", "scales", "amax")),
        ("rotation", Rotation),
        ("seed", c_uint64),
        *((name, c_int64) for name in ("matrices", "rows", "columns")),
        ("bound", c_float),
        *((name, c_int32) for name in ("candidates", "square", "stochastic")),
    )


class Scan(Structure):
    """A Mamba-2 recurrence over sequences, and its gradients."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("x", "dt", "a", "b", "c", "d", "initial", "starts", "y", "last", "dy", "dlast")
        ),
        *((name, c_void_p) for name in ("dx", "ddt", "da", "db", "dc", "dd", "dinitial")),
        *((name, c_int64) for name in ("batch", "length", "heads", "dim", "groups", "state")),
        *((name, c_int64) for name in ("x_stride", "b_stride", "c_stride", "shares")),
    )


class Convolution(Structure):
    """A causal convolution over sequences, and its gradients."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "bias", "starts", "y", "dy", "dx", "dweight")),
        *((name, c_int64) for name in ("batch", "length", "width", "kernel", "x_stride")),
    )


class Gate(Structure):
    """A gated norm, and its gradients."""

    _fields_ = (
        *((name, c_void_p) for name in ("y", "z", "weight", "out", "dout", "dy", "dz", "dweight")),
        *((name, c_int64) for name in ("rows", "width", "groups", "z_stride")),
        ("eps", c_float),
    )


class Kept(Structure):
    """What conversations keep of a Mamba-2 mixer."""

    _fields_ = (("windows", c_void_p), ("states", c_void_p), ("count", c_int64), ("kind", c_int32))


class MambaStep(Structure):
    """A token each of several conversations through a Mamba-2 mixer."""

    _fields_ = (
        *((name, c_void_p) for name in ("mamba", "parts", "y", "slots")),
        ("kept", Kept),
        ("count", c_int64),
        ("stride", c_int64),
        ("seed", c_uint64),
        ("eps", c_float),
    )


ARGUMENTS = {
    "pack_nvfp4": (c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p),
    "pack": (c_void_p, c_long, c_long, c_long, c_void_p),
    "multiply": (POINTER(Matrix), c_void_p, c_int32, c_long, c_void_p, c_long),
    "decode": (POINTER(Model), POINTER(Cache), POINTER(Batch), c_long),
    "attend": (POINTER(Pages), c_void_p, c_void_p, c_long, c_void_p, c_long),
    "route": (POINTER(MoE), c_void_p, c_long, c_void_p, c_void_p),
    "experts": (POINTER(MoE), c_void_p, c_long, c_long, c_void_p, c_void_p, c_long),
    "draw": (c_void_p, c_long, c_long, c_long, c_void_p, c_void_p, c_void_p, c_void_p, c_long),
    "quantize": (POINTER(Quantising), c_long),
    "dequantize": (c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p, c_long),
    "transform": (POINTER(Rotation), c_void_p, c_void_p, c_long, c_long),
    "mamba_step": (POINTER(MambaStep), c_long),
    "scan_forward": (POINTER(Scan), c_long),
    "convolution_forward": (POINTER(Convolution), c_long),
    "gate_forward": (POINTER(Gate), c_long),
    "scan_backward": (POINTER(Scan), c_long),
    "convolution_backward": (POINTER(Convolution), c_long),
    "gate_backward": (POINTER(Gate), c_long),
}
"""Of every function, under its name without `palaestra_`."""
VOID = {"pack_nvfp4", "pack", "route", "dequantize", "transform"}
"""Those that cannot fail. The others return 0, or 1 where memory for the work cannot be had; quantize what it refused,
mamba_step NO_SLOT."""
NO_SLOT = 2
NOT_FINITE, NO_FIT = 1, 2
"""`enum refusal` of cpu/records.h."""


class Library:
    """The C functions, and the tier that they use."""

    pack_nvfp4: Callable[..., None]
    pack: Callable[..., None]
    multiply: Callable[..., int]
    decode: Callable[..., int]
    attend: Callable[..., int]
    route: Callable[..., None]
    experts: Callable[..., int]
    draw: Callable[..., int]
    quantize: Callable[..., int]
    dequantize: Callable[..., None]
    transform: Callable[..., None]
    mamba_step: Callable[..., int]
    scan_forward: Callable[..., int]
    convolution_forward: Callable[..., int]
    gate_forward: Callable[..., int]
    scan_backward: Callable[..., int]
    convolution_backward: Callable[..., int]
    gate_backward: Callable[..., int]

    def __init__(self, file: Path, tier: str | None) -> None:
        code = ctypes.CDLL(str(file))
        use = code.palaestra_use
        use.argtypes, use.restype = (c_char_p,), c_char_p
        found: bytes | None = use(tier.encode() if tier else None)
        if found is None:
            raise ValueError(f"{VARIABLE}={tier}: this machine has no such tier; leave it out, or set {TORCH}")
        self.tier = found.decode()
        for name, arguments in ARGUMENTS.items():
            function = getattr(code, f"palaestra_{name}")
            function.argtypes, function.restype = arguments, None if name in VOID else ctypes.c_int
            setattr(self, name, function)


@functools.cache
def library() -> Library | None:
    """The library, or None (with one warning, unless it was asked for) where everything runs in PyTorch.

    Raises ValueError for a tier that this machine does not have.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted == TORCH:
        return None
    if not FILE.exists():
        warnings.warn(
            "palaestra was installed without a C compiler: its kernels run in PyTorch, several times slower. "
            "Install gcc, then palaestra again.",
            stacklevel=2,
        )
        return None
    return Library(FILE, wanted)


def floats(*shape: int) -> Tensor:
    """Room for float32 that C writes, on the CPU whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def pointer(tensor: Tensor) -> int:
    """Where a contiguous tensor's first value lies."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()
