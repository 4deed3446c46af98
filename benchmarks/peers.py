"""NVFP4 products of a few rows beside torch's and ggml's: `python benchmarks/peers.py [--json FILE]`.

All candidates of a row take turns, so that noise meets them alike; a figure is the median of the rounds in us. Weights
rotate over more memory than the cache holds, or, in the last shape, stay in it. Of ggml's ways (the weight as it is,
the weight laid out anew for the machine, the bare dot product) the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggml
import torch

from kernels import BATCHES, FROM_MEMORY, SHAPES, plain_product, product, take_turns
from palaestra.kernels import nvfp4
from palaestra.kernels.linear import pack
from palaestra.kernels.native import Library, library

FROM_CACHE = (1024, 256)
THREADS = (1, 2)
LEAST, WEIGHTS = 3, 4e8
"""A candidate's turn: so many calls at least, and about so many weights times rows of activations."""
REST = 0.02
"""Seconds before our turns: OpenMP's threads, torch's and ggml's, keep a core busy for up to 10 ms after their last
call, which ours would have to share."""

Candidates = dict[str, Callable[[], Any]]


def ours(native: Library, rows: int, columns: int, batch: int) -> Candidates:
    """Ours and torch's, with as many threads as torch has."""
    plain, x = torch.randn(rows, columns, dtype=torch.bfloat16), torch.randn(batch, columns)
    quantised = nvfp4.quantize(plain.float())
    packed = [pack(native, quantised) for _ in range(copies(pack(native, quantised).nbytes, rows, columns))]
    return {
        "ours": product(native, packed, x, int8=False),
        "ours, int8": product(native, packed, x, int8=True),
        "torch, bf16": plain_product([plain.clone() for _ in range(copies(plain.nbytes, rows, columns))], x),
    }


def theirs(rows: int, columns: int, batch: int) -> Candidates:
    """ggml's types, each in all its ways."""
    found: Candidates = {}
    for kind in ggml.TYPES:
        count = copies(ggml.nbytes(kind, rows, columns), rows, columns)
        ways = ggml.candidates(ggml.Case(kind, rows, columns, count, batch, torch.get_num_threads()))
        found |= {f"ggml, {kind}: {way}": call for way, call in ways.items()}
    return found


def copies(nbytes: int, rows: int, columns: int) -> int:
    """How many weights take turns."""
    return 1 if (rows, columns) == FROM_CACHE else FROM_MEMORY // nbytes


def fastest(seconds: dict[str, list[float]]) -> dict[str, tuple[str, list[float]]]:
    """Of each candidate its fastest way, by the median of the rounds, and that way's rounds."""
    found: dict[str, tuple[str, list[float]]] = {}
    for name, rounds in seconds.items():
        candidate, _, way = name.partition(": ")
        _, best = found.setdefault(candidate, (way, rounds))
        if statistics.median(rounds) < statistics.median(best):
            found[candidate] = way, rounds
    return found


def measured(native: Library, rows: int, columns: int, batch: int) -> dict[str, Any]:
    """One row of the table, and the ways that ggml was fastest in."""
    repeats = max(LEAST, int(WEIGHTS / (rows * columns * batch)))
    rest: Candidates = {"rest": lambda: time.sleep(REST / repeats)}
    found = fastest(take_turns(rest | ours(native, rows, columns, batch) | theirs(rows, columns, batch), repeats))
    del found["rest"]
    return {
        "shape": f"{rows}x{columns}",
        "from": "cache" if (rows, columns) == FROM_CACHE else "memory",
        "batch": batch,
        "threads": torch.get_num_threads(),
        **{name: round(1e6 * statistics.median(rounds), 1) for name, (_, rounds) in found.items()},
        "ways": {name: way for name, (way, _) in found.items() if way},
    }


def show(found: list[dict[str, Any]]) -> None:
    """The last row, and before the first one the names of the columns; the way that was fastest in brackets."""
    row = dict(found[-1])
    ways = row.pop("ways")
    if len(found) == 1:
        print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
    shown = (f"{value} ({ways[name]})" if name in ways else str(value) for name, value in row.items())
    print("| " + " | ".join(shown) + " |", flush=True)


def main() -> None:
    """Measure and print row by row, and write the JSON file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    native = library()
    if native is None:
        raise SystemExit("the kernels were not built: there was no C compiler")
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for shape in (*SHAPES, FROM_CACHE):
            for batch in BATCHES:
                found.append(measured(native, *shape, batch))
                show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
