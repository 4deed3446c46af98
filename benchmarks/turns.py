"""How the benchmarks of kernels time things: candidates take turns in every round, so that noise meets them alike."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from palaestra.kernels.memory import Arena
from palaestra.kernels.native import Library, library

ROUNDS = 7
FROM_MEMORY = 256 << 20
"""Bytes that are read before one is read again, more than caches hold."""
REST = 0.02
"""Seconds before a turn: OpenMP's threads, torch's and others', keep a core busy for up to 10 ms after their last call,
which the next candidate would have to share."""

Candidates = Mapping[str, Callable[[], Any]]
Seconds = dict[str, list[float]]
"""A call's, by candidate, one figure a round."""


def take_turns(candidates: Candidates, repeats: int, rounds: int = ROUNDS) -> Seconds:
    """Time them; every turn begins with a call that does not count."""
    found: Seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            time.sleep(REST)
            call()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            found[name].append((time.perf_counter() - started) / repeats)
    return found


def microseconds(rounds: list[float]) -> float:
    """Their median."""
    return round(1e6 * statistics.median(rounds), 1)


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of how many times faster."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


def upper(slow: list[float], fast: list[float]) -> float:
    """The upper quartile of the same: where the rounds spread that far, a bar counts as met."""
    return round(statistics.quantiles((a / b for a, b in zip(slow, fast, strict=True)), method="inclusive")[2], 2)


def fastest(seconds: Iterable[list[float]]) -> list[float]:
    """The one of the least median."""
    return min(seconds, key=statistics.median)


PART = FROM_MEMORY // 8


def bandwidth() -> Callable[[], torch.Tensor]:
    """Reads the next PART of FROM_MEMORY bytes, in huge pages as weights are, with torch's number of threads."""
    after = following(list(Arena().zeros((FROM_MEMORY // 4,), torch.float32).fill_(1).chunk(FROM_MEMORY // PART)))
    return lambda: after().sum()


def following(items: list[Any]) -> Callable[[], Any]:
    """The next item of a ring."""
    ring = itertools.cycle(items)
    return lambda: next(ring)


def bare(file: Path, name: str) -> Callable[..., Any]:
    """A function of a library that is there, for arguments that are C's already: without checks, calls cost half."""
    found: Callable[..., Any] = getattr(ctypes.CDLL(str(file)), name)
    return found


def main(description: str | None, measure: Callable[[], Any]) -> None:
    """Measure, print, and write the JSON file that is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    text = json.dumps(measure(), indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


def built() -> Library:
    """The C kernels. Ends the program where they were not built."""
    found = library()
    if found is None:
        raise SystemExit("the kernels were not built: there was no C compiler")
    return found
