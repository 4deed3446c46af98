"""The Triton kernels on a CUDA device: `python benchmarks/kernels_cuda.py [--json FILE]`.

Products with NVFP4 weights against cuBLAS in bf16 and against what copying memory reaches in the same run; the chunked
scan against mamba-ssm's, where that is installed. Candidates take turns in every round; a figure is the median of the
rounds. Every call is part of a CUDA graph, so that launching costs nothing, and weights rotate over more memory than
the L2 cache holds.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from turns import main

from palaestra.kernels import nvfp4

ROUNDS = 7
CACHES = 4
"""Times the L2 cache that weights take together."""
COPIED = 1 << 30
SHAPES = {
    "Nano expert, up": (1856, 2688),
    "Nano expert, down": (2688, 1856),
    "Super expert, up": (2688, 1024),
    "Super expert, down": (1024, 2688),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS, HEADS, DIM, GROUPS, STATE, CHUNK = 8192, 64, 64, 8, 128, 128

Calls = list[Callable[[], Any]]


def captured(calls: Calls) -> torch.cuda.CUDAGraph:
    """A graph of all calls, each run once before: that compiles it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds that a graph takes."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(candidates: Mapping[str, Calls]) -> dict[str, float]:
    """The median over the rounds of the seconds a call, by candidate."""
    graphs = {name: captured(calls) for name, calls in candidates.items()}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for graph in graphs.values():
        replayed(graph)
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            found[name].append(replayed(graph) / len(candidates[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.ones(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / take_turns({"copy": [lambda: target.copy_(source)]})["copy"]


def products(memory: float) -> list[dict[str, Any]]:
    """A row a shape and number of rows of activations."""
    from palaestra.kernels.triton.linear import linear

    together = CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    found = []
    for name, (rows, columns) in SHAPES.items():
        plain = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        quantised = nvfp4.quantize(plain)
        size = quantised.codes.nbytes + quantised.scales.nbytes
        ours = [nvfp4.NVFP4(*(part.clone() for part in quantised)) for _ in range(together // size + 1)]
        theirs = [plain.clone() for _ in range(together // plain.nbytes + 1)]
        for batch in BATCHES:
            x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
            seconds = take_turns(
                {
                    "ours": [lambda x=x, weight=weight: linear(x, weight) for weight in ours],
                    "cuBLAS": [lambda x=x, weight=weight: torch.nn.functional.linear(x, weight) for weight in theirs],
                }
            )
            found.append(
                {
                    "weight": f"{name} {rows}x{columns}",
                    "rows": batch,
                    "NVFP4, us": round(1e6 * seconds["ours"], 2),
                    "cuBLAS bf16, us": round(1e6 * seconds["cuBLAS"], 2),
                    "times cuBLAS": round(seconds["cuBLAS"] / seconds["ours"], 2),
                    "share of the bandwidth": round(size / seconds["ours"] / memory, 2),
                }
            )
    return found


def scans() -> dict[str, float]:
    """Microseconds of the scan's forward pass, bf16, at Nano's shape."""
    from palaestra.kernels.triton.scan import scan

    x = torch.randn(TOKENS, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    b, c = (torch.randn(TOKENS, GROUPS, STATE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    dt, a = torch.rand(TOKENS, HEADS, device="cuda") / 8, -torch.rand(HEADS, device="cuda")
    state = torch.zeros(1, HEADS, DIM, STATE, device="cuda")
    starts = torch.tensor([0, TOKENS], device="cuda")
    candidates: dict[str, Calls] = {"ours": [lambda: scan(x, dt, a, b, c, state, starts)]}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        one = [part[None] for part in (x, dt, b, c)]
        candidates["mamba-ssm"] = [lambda: mamba_chunk_scan_combined(one[0], one[1], a, one[2], one[3], CHUNK)]
    return {f"{name}, us": round(1e6 * seconds, 1) for name, seconds in take_turns(candidates).items()}


@torch.no_grad()
def measure() -> dict[str, Any]:
    """All of it. Raises SystemExit where there is nothing to measure on."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: nothing was measured")
    if not importlib.util.find_spec("triton"):
        raise SystemExit("triton is not installed: pip install 'palaestra[cuda]'")
    torch.manual_seed(0)
    memory = bandwidth()
    return {
        "device": torch.cuda.get_device_name(),
        "bandwidth of a copy, GB/s": round(memory / 1e9),
        "products": products(memory),
        f"scan of {TOKENS} tokens": scans(),
    }


if __name__ == "__main__":
    main(__doc__, measure)
