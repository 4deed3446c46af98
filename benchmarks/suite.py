"""Bar 8: the unmarked tests' time, and their line coverage of gym, rollout and trainer."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bars import ROOT, Measured

ROOMS = ("gym", "rollout", "trainer")
MINUTES, COVERAGE = 10.0, 90.0
SECONDS = 3600


def suite() -> Measured:
    """The tests once as `make test` runs them, for their time, and once under coverage."""
    pytest = [sys.executable, "-P", "-m", "pytest", "-q"]
    started = time.monotonic()
    plain = subprocess.run(pytest, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    minutes = (time.monotonic() - started) / 60
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "coverage.json"
        rooms = [f"--cov=palaestra.{room}" for room in ROOMS]
        covered = subprocess.run([*pytest, *rooms, f"--cov-report=json:{report}"], cwd=ROOT, capture_output=True,
                                 text=True, timeout=SECONDS)  # fmt: skip
        files = json.loads(report.read_text())["files"]
    shares = {room: _share(files, room) for room in ROOMS}
    figures = {"minutes": round(minutes, 1), "tests": plain.stdout.strip().splitlines()[-1], "line coverage": shares}
    met = not plain.returncode and not covered.returncode and minutes < MINUTES and min(shares.values()) >= COVERAGE
    return Measured(met, figures)


def _share(files: dict[str, dict[str, dict[str, int]]], room: str) -> float:
    """Covered lines of a folder in percent."""
    parts = [part["summary"] for name, part in files.items() if Path(name).parts[-2:-1] == (room,)]
    return round(100 * sum(p["covered_lines"] for p in parts) / sum(p["num_statements"] for p in parts), 1)
