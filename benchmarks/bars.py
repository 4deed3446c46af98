"""Re-run acceptance bars: `make bars GROUP=main`, one alone by `BAR=3`, the quick ones by `ARGS=--quick`.

Each bar is a function that returns what it measured and whether the threshold is met; `benchmarks/bars_<group>.py`
lists them in BARS. Results go to `benchmarks/results/<group>.json` after every bar; a bar already measured at this
commit is skipped, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Measured(NamedTuple):
    """What a bar saw, and whether that meets its threshold."""

    met: bool
    figures: dict[str, Any]


class Bar(NamedTuple):
    """A bar as declared."""

    number: int
    threshold: str
    quick: bool
    measure: Callable[[], Measured]


def bar(number: int, threshold: str, quick: bool = False) -> Callable[[Callable[[], Measured]], Bar]:
    """Declare a bar; `quick` ones take at most a few minutes and run in CI."""
    return lambda measure: Bar(number, threshold, quick, measure)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def commit() -> str:
    """The commit that is measured; `+` marks uncommitted changes."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    dirty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return head.strip() + ("+" if dirty.strip() else "")


def load(group: str) -> list[Bar]:
    """The bars of a group, by number. Exits with the groups' names where there is none of that name."""
    file = ROOT / "benchmarks" / f"bars_{group}.py"
    if not file.exists():
        names = ", ".join(sorted(found.stem.removeprefix("bars_") for found in file.parent.glob("bars_*.py")))
        sys.exit(f"there is no group {group!r} of bars; the groups are: {names}")
    found: tuple[Bar, ...] = importlib.import_module(f"bars_{group}").BARS
    return sorted(found, key=lambda known: known.number)


def measure(found: Bar) -> dict[str, Any]:
    """Run one bar; an exception is a bar that is not met, with the reason."""
    started = time.monotonic()
    try:
        met, figures = found.measure()
    except Exception as error:
        met, figures = False, {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.monotonic() - started, 1)
    return {"threshold": found.threshold, "met": met, "figures": figures, "seconds": seconds, "machine": machine()}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    scratch.replace(path)


def main(arguments: list[str]) -> int:
    """Run the bars that the arguments name; 1 if any of them is not met."""
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    group, number = settings.get("GROUP", "main"), settings.get("BAR")
    path = RESULTS / f"{group}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    at, failed = commit(), 0
    for found in load(group):
        if number is not None and found.number != int(number):
            continue
        if number is None and "--quick" in arguments and not found.quick:
            continue
        old = results.get(str(found.number), {})
        if number is None and old.get("commit") == at and old.get("met"):
            print(f"bar {found.number}: measured at this commit already", flush=True)
            continue
        print(f"bar {found.number}: {found.threshold}", flush=True)
        result = measure(found) | {"commit": at}
        results[str(found.number)] = result
        write(path, results)
        failed += not result["met"]
        print(
            f"bar {found.number}: {'met' if result['met'] else 'NOT met'} {json.dumps(result['figures'])}", flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.modules["bars"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
