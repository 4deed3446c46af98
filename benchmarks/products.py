"""NVFP4 products of a few rows beside torch's, ggml's and the memory: `python benchmarks/products.py [--json FILE]`.

Weights rotate over more memory than the cache holds, or, in the last shape, stay in it. Of our activations (float32,
bf16, int8), of ggml's types and of each type's ways (the weight as it is, laid out anew for the machine, the bare dot
product) the fastest counts. No dequantised copy of a weight is kept: ours take .56 bytes a weight, torch's 2.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from ctypes import c_int32, c_long, c_void_p
from typing import Any

import ggml
import torch
from turns import (
    FROM_MEMORY,
    PART,
    Candidates,
    Seconds,
    bandwidth,
    bare,
    built,
    fastest,
    following,
    main,
    microseconds,
    ratio,
    take_turns,
    upper,
)

from palaestra.kernels import nvfp4
from palaestra.kernels.linear import Packed, pack
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import FILE, INT8, KINDS, TILE, Library

FROM_CACHE = (1024, 256)
SHAPES = ((2688, 1024), (4096, 4096), FROM_CACHE)
BATCHES = (1, 8)
MANY = (64, 256)
"""Batches for torch alone to be compared with, from memory."""
THREADS = (1, 2)
LEAST, WEIGHTS = 3, 4e8
"""A candidate's turn: so many calls at least, and about so many weights times rows of activations."""
ACTIVATIONS = {
    "float32": KINDS[torch.float32],
    "bf16": KINDS[torch.bfloat16],
    "int8": INT8,
}
OURS, TORCH, GGML, READ = "ours", "torch, bf16", "ggml", "memory"
UPPER = "upper quartiles"


class Product:
    """Ours with the next of the weights; calls do nothing beside."""

    def __init__(self, multiply: Callable[..., Any], weights: list[Packed], x: torch.Tensor, activations: str) -> None:
        self.x = x.bfloat16() if activations == "bf16" else x
        self.y = torch.empty(len(x), weights[0].record.tiles * TILE)
        shared = (
            c_void_p(self.x.data_ptr()),
            c_int32(ACTIVATIONS[activations]),
            c_long(len(x)),
            c_void_p(self.y.data_ptr()),
            c_long(torch.get_num_threads()),
        )
        self.weights, self.multiply = weights, multiply
        self.following = following([(ctypes.byref(weight.record), *shared) for weight in weights])

    def __call__(self) -> None:
        self.multiply(*self.following())


def plain_product(weights: list[torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torch's in the weights' dtype."""
    after, x = following(weights), x.to(weights[0].dtype)
    return lambda: torch.nn.functional.linear(x, after())


def copies(nbytes: int, shape: tuple[int, int]) -> int:
    """How many weights take turns."""
    return 1 if shape == FROM_CACHE else FROM_MEMORY // nbytes


def ours(native: Library, shape: tuple[int, int], batch: int) -> tuple[Candidates, int]:
    """Ours and torch's, with as many threads as torch has, and the bytes of one of our weights."""
    plain, x, arena = torch.randn(shape, dtype=torch.bfloat16), torch.randn(batch, shape[1]), Arena()
    quantised = nvfp4.quantize(plain.float())
    nbytes = pack(native, quantised).nbytes
    packed = [pack(native, quantised, arena) for _ in range(copies(nbytes, shape))]
    multiply = bare(FILE, "palaestra_multiply")
    found = {f"{OURS}, {kind}": Product(multiply, packed, x, kind) for kind in ACTIVATIONS}
    return found | {TORCH: plain_product([plain.clone() for _ in range(copies(plain.nbytes, shape))], x)}, nbytes


def theirs(shape: tuple[int, int], batch: int) -> Candidates:
    """ggml's types, each in all its ways."""
    found = {}
    for kind in ggml.TYPES:
        case = ggml.Case(kind, *shape, copies(ggml.nbytes(kind, *shape), shape), batch, torch.get_num_threads())
        found |= {f"{GGML}, {kind}: {way}": call for way, call in ggml.candidates(case).items()}
    return found


def of(seconds: Seconds, start: str) -> list[float]:
    """The fastest of those whose names begin so."""
    return fastest(rounds for name, rounds in seconds.items() if name.startswith(start))


def row(native: Library, shape: tuple[int, int], batch: int) -> dict[str, Any]:
    """One row of the table: medians in us and, by their names, how many times faster ours is."""
    candidates, nbytes = ours(native, shape, batch)
    peers = theirs(shape, batch) if batch in BATCHES else {}
    repeats = max(LEAST, int(WEIGHTS / (shape[0] * shape[1] * batch)))
    seconds = take_turns({**candidates, **peers, READ: bandwidth()}, repeats)
    best = of(seconds, OURS)
    found = {
        "shape": "x".join(map(str, shape)),
        "from": "cache" if shape == FROM_CACHE else "memory",
        "batch": batch,
        "threads": torch.get_num_threads(),
        **{f"{name}, us": microseconds(rounds) for name, rounds in seconds.items() if name.startswith(OURS)},
        f"{TORCH}, us": microseconds(seconds[TORCH]),
        **{f"{GGML}, {kind}, us": microseconds(of(seconds, f"{GGML}, {kind}:")) for kind in (peers and ggml.TYPES)},
    }
    against = {"times torch": seconds[TORCH]}
    if peers:
        against |= {"times ggml's fastest": of(seconds, GGML)}
        against |= {f"times ggml, {kind}": of(seconds, f"{GGML}, {kind}:") for kind in ("Q4_K", "NVFP4")}
    if shape != FROM_CACHE:
        found["GB/s"] = round(PART / 1e3 / microseconds(seconds[READ]), 1)
        against["share of it"] = [nbytes / PART * taken for taken in seconds[READ]]
    found |= {what: ratio(rounds, best) for what, rounds in against.items()}
    return found | {UPPER: {what: upper(rounds, best) for what, rounds in against.items()}}


def rows(native: Library) -> list[dict[str, Any]]:
    """The whole table. Sets torch's number of threads back."""
    found, most = [], torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for batch in (*BATCHES, *(MANY if shape != FROM_CACHE else ())):
                found.append(row(native, shape, batch))
                print(json.dumps(found[-1]), flush=True)
    torch.set_num_threads(most)
    return found


if __name__ == "__main__":
    main(__doc__, lambda: rows(built()))
