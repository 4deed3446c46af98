"""Boxes, native against Docker, in one run: `python benchmarks/sandbox.py [--json FILE] [--cycles N]`."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox import processes
from palaestra.environments.sandbox.backends import Backend, open_backend
from palaestra.environments.sandbox.base import NAME
from palaestra.gym.sandbox import BoxLimits

ROUNDS, CYCLES, WITHIN, LIVE = 7, 10, 200, 64
LIMITS = BoxLimits(memory=256 << 20)
IMAGES = {"native": "host", "docker": NAME}


async def timed(work: Callable[[], Awaitable[Any]]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


async def cycle(backend: Backend, image: str) -> None:
    """Create, first command, destroy."""
    box = await backend.create(image, LIMITS)
    await box.exec("true", 30)
    await box.destroy()


async def within(backend: Backend, image: str) -> float:
    """The median of a command in a live shell, in seconds."""
    box = await backend.create(image, LIMITS)
    try:
        return statistics.median([await timed(lambda: box.exec("true", 30)) for _ in range(WITHIN)])
    finally:
        await box.destroy()


async def live(backend: Backend, image: str) -> dict[str, float]:
    """Seconds until so many boxes have run a command, and the memory of one (resident, of all its processes)."""
    started = time.perf_counter()
    boxes = await asyncio.gather(*(backend.create(image, LIMITS) for _ in range(LIVE)))
    try:
        await asyncio.gather(*(box.exec("true", 30) for box in boxes))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "MiB a box": statistics.mean(_memory(box.init) for box in boxes)}
    finally:
        await asyncio.gather(*(box.destroy() for box in boxes))


def _memory(init: int) -> float:
    """Proportional set size of a box's processes and of what keeps it on the host, in MiB."""
    parent = int(Path(f"/proc/{init}/stat").read_text().rpartition(")")[2].split()[1])
    total = 0
    for pid in {*processes.inside(processes.namespace(init)), parent}:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def held() -> dict[str, int]:
    """Mounts, control groups, processes of boxes, folders: what boxes could leave behind."""
    return {
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "groups": len(list(Path("/sys/fs/cgroup").glob("**/palaestra-*/*/"))),
        "bwrap processes": sum(_is_bwrap(path) for path in Path("/proc").glob("[0-9]*/comm")),
        "folders": len(list(Path("/tmp").glob("palaestra-box*"))),
    }


def _is_bwrap(path: Path) -> bool:
    try:
        return path.read_text().strip() == "bwrap"
    except OSError:
        return False


async def leftovers(name: str, cycles: int) -> dict[str, Any]:
    """What is there after so many cycles that was not there before."""
    before = held()
    backend = open_backend(name)
    for _ in range(cycles):
        await cycle(backend, IMAGES[name])
    await backend.close()
    after = held()
    return {"cycles": cycles, **{what: after[what] - before[what] for what in before}}


async def measure(names: list[str], cycles: dict[str, int]) -> dict[str, Any]:
    """All of it; the rounds of the backends take turns."""
    backends = {name: open_backend(name) for name in names}
    found: dict[str, Any] = {name: {} for name in names}
    try:
        for name, backend in backends.items():
            await cycle(backend, IMAGES[name])
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name, backend in backends.items():
                rounds[name] += [await timed(partial(cycle, backend, IMAGES[name])) for _ in range(CYCLES)]
        for name, backend in backends.items():
            found[name]["cycle, ms"] = round(1000 * statistics.median(rounds[name]), 2)
            found[name]["command, ms"] = round(1000 * await within(backend, IMAGES[name]), 3)
        if "native" in names:
            found["native"][f"{LIVE} live"] = await live(backends["native"], IMAGES["native"])
    finally:
        for backend in backends.values():
            await backend.close()
    for name in names:
        found[name]["left behind"] = await leftovers(name, cycles[name])
    return found


def main() -> None:
    """Measure, print, and write the JSON file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backends", nargs="+", default=["native", "docker"])
    parser.add_argument("--cycles", type=int, default=10_000, help="of native; a fiftieth of it of docker")
    given = parser.parse_args()
    found = asyncio.run(measure(given.backends, {"native": given.cycles, "docker": max(1, given.cycles // 50)}))
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
