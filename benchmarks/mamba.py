"""Mamba-2's kernels against PyTorch and transformers: `python benchmarks/mamba.py [--json FILE]`.

Candidates take turns in every round; a figure is the median of the rounds. Peak memory is by how much one call, its
inputs being there, raises a fresh process's resident set at most, as Linux counts it (VmHWM, set back before the call).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import FROM_MEMORY, built, following, main, ratio, take_turns, upper

from palaestra.kernels.mamba import STATES, Mixer, Slots, gated_norm_plain, recur, scan, scan_plain, step, step_plain
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import library

NANO, SMALL = (64, 64, 128, 8), (8, 64, 64, 2)
"""Heads, their width, the state's width, groups."""
SCANS = {"Nano, 1 x 512": (1, 512, NANO), "Nano, 1 x 2048": (1, 2048, NANO), "small, 8 x 256": (8, 256, SMALL)}
CHUNK = 128
"""transformers' chunk for Nemotron-H."""
CONVERSATIONS = (1, 32)

Pass = Callable[[], Any]


def inputs(batch: int, length: int, sizes: tuple[int, int, int, int]) -> list[Tensor]:
    """x, dt, A, B, C, D of a scan."""
    heads, dim, state, groups = sizes
    torch.manual_seed(0)
    dt = F.softplus(torch.randn(batch, length, heads) - 3)
    b, c = torch.randn(2, batch, length, groups, state)
    x = torch.randn(batch, length, heads, dim)
    return [x, dt, -torch.arange(1.0, heads + 1), b, c, torch.randn(heads)]


def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of transformers."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    y, last = mamba2_chunk_scan(x, dt, a, b, c, CHUNK, D=d, return_final_states=True)
    return y, last


SCANNERS = {"ours": scan, "plain": scan_plain, "transformers": theirs}


def forward(name: str, case: str) -> Pass:
    """A scan without gradients."""
    given, of = inputs(*SCANS[case]), torch.no_grad()(SCANNERS[name])
    return lambda: of(*given)


def backward(name: str, case: str) -> Pass:
    """A scan, and the gradients of all its inputs."""
    given = [tensor.requires_grad_() for tensor in inputs(*SCANS[case])]
    flow = torch.randn_like(given[0])
    return lambda: torch.autograd.grad(SCANNERS[name](*given)[0], given, flow)


PASSES = {"forward": forward, "with backward": backward}


def peak(way: str, name: str, case: str) -> int:
    """Bytes by which one pass raises this process's resident set at most."""
    torch.set_num_threads(1)
    library()
    theirs(*inputs(1, 8, SMALL))  # imports
    call = PASSES[way](name, case)
    Path("/proc/self/clear_refs").write_text("5")
    before = highest()
    call()
    return highest() - before


def highest() -> int:
    """Bytes of the largest resident set since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory() -> list[dict[str, Any]]:
    """A row a pass and case: MB at the peak, by candidate, each in its own process with one thread."""
    found = []
    for way, case in itertools.product(PASSES, SCANS):
        row: dict[str, Any] = {"peak MB of": way, "case": case}
        for name in SCANNERS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row[name] = round(pool.submit(peak, way, name, case).result() / 1e6)
        found.append(row)
    return found


def scans(way: str) -> list[dict[str, Any]]:
    """A row a case: milliseconds, and how many times faster than the others."""
    found = []
    for case in SCANS:
        seconds = take_turns({name: PASSES[way](name, case) for name in SCANNERS}, 1)
        found.append(
            {
                "scan": way,
                "case": case,
                "threads": torch.get_num_threads(),
                **{f"{name}, ms": round(1e3 * statistics.median(rounds), 2) for name, rounds in seconds.items()},
                **{f"times {name}": ratio(seconds[name], seconds["ours"]) for name in ("plain", "transformers")},
            }
        )
    return found


def mixer(sizes: tuple[int, int, int, int]) -> Mixer:
    """One with a convolution of four tokens."""
    heads, dim, state, groups = sizes
    width = heads * dim + 2 * groups * state
    vectors = torch.randn(width), torch.randn(heads), -torch.arange(1.0, heads + 1), torch.randn(heads)
    return Mixer(torch.randn(4, width), *vectors, torch.randn(heads * dim), groups)


def step_in_place(of: Mixer, parts: Tensor, slots: Slots) -> Tensor:
    """`step_plain` for all slots in their order, so that no state needs to be copied."""
    inner, width, shared = of.width, len(of.conv_bias), of.groups * of.state
    z, fresh, dt = parts.split([inner, width, of.heads], dim=-1)
    window = torch.cat([slots.windows, fresh[:, None]], 1)
    slots.windows.copy_(window[:, 1:])
    x, b, c = F.silu((window * of.conv).sum(1) + of.conv_bias).split([inner, shared, shared], dim=-1)
    x, b, c = x.unflatten(1, (of.heads, -1)), b.unflatten(1, (of.groups, -1)), c.unflatten(1, (of.groups, -1))
    y = recur(x, F.softplus(dt + of.dt_bias), of.a, b, c, slots.states) + of.d[:, None] * x
    return gated_norm_plain(y.flatten(1), z, of.norm, of.groups, of.eps)


def steps(sizes: tuple[int, int, int, int] = NANO) -> list[dict[str, Any]]:
    """A row a number of conversations: microseconds, how many times faster than PyTorch, and the share of the rate at
    which `mul_` reads and writes as much float32 memory. One conversation's states stay in the cache, those of 32 come
    from memory."""
    return [_step_row(sizes, count) for count in CONVERSATIONS]


@torch.no_grad()
def _step_row(sizes: tuple[int, int, int, int], count: int) -> dict[str, Any]:
    of = mixer(sizes)
    parts, all_rows = torch.randn(count, of.width + len(of.conv_bias) + of.heads), torch.arange(count)
    bytes_each = count * of.heads * of.dim * of.state * 4
    copies = max(1, FROM_MEMORY // bytes_each) if count > 1 else 1
    pools = {dtype: [Slots.empty(of, count, dtype) for _ in range(copies)] for dtype in STATES}
    after = {dtype: following(pool) for dtype, pool in pools.items()}
    arena = Arena()  # huge pages, as the states'
    moved = following([arena.zeros((bytes_each // 4,), torch.float32).fill_(1) for _ in range(copies)])
    candidates: dict[str, Pass] = {
        f"ours, {str(dtype).removeprefix('torch.')}": lambda dtype=dtype: step(of, parts, after[dtype](), all_rows)
        for dtype in STATES
    }
    candidates["plain"] = lambda: step_plain(of, parts, after[torch.float32](), all_rows)
    candidates["plain, in place"] = lambda: step_in_place(of, parts, after[torch.float32]())
    candidates["mul_"] = lambda: moved().mul_(1.0)
    seconds = take_turns(candidates, 3 if count > 1 else 30)
    return {
        "step of conversations": count,
        "threads": torch.get_num_threads(),
        **{f"{name}, us": round(1e6 * statistics.median(rounds), 1) for name, rounds in seconds.items()},
        **{f"times {name}": ratio(seconds[name], seconds["ours, float32"]) for name in ("plain", "plain, in place")},
        "times plain, in place, upper quartile": upper(seconds["plain, in place"], seconds["ours, float32"]),
        "roofline: times plain, in place": ratio(seconds["plain, in place"], seconds["mul_"]),
        "share of the bandwidth": ratio(seconds["mul_"], seconds["ours, float32"]),
    }


def measure() -> list[dict[str, Any]]:
    """All rows, the timed ones with one thread and with all."""
    found, most = memory(), torch.get_num_threads()
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        found += [*scans("forward"), *scans("with backward"), *steps()]
    torch.set_num_threads(most)
    return found


if __name__ == "__main__":
    main(__doc__, lambda: {"tier": built().tier, "rows": measure()})
