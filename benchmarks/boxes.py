"""What boxes withstand and what they cost: bars 1 to 4 of group sandbox."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bars import ROOT, Measured
from cases import Cases, counted, run

BACKENDS = ("native", "docker")
ATTACKS, HACKS = 40, 20
SECONDS = 6 * 3600


def attacks() -> Measured:
    """The attack battery on each backend."""
    found = run(["tests/test_sandbox_attacks.py", "-m", ""])
    figures = {name: counted(of_backend(found, name)) for name in BACKENDS}
    met = all(part["passed"] == part["cases"] >= ATTACKS for part in figures.values())
    return Measured(met, figures)


def of_backend(found: Cases, name: str) -> Iterable[ElementTree.Element]:
    """The cases that ran on a backend: its name stands in their brackets."""
    return [case for cases in found.values() for label, case in cases.items() if name in label.split("-")]


def hacks() -> Measured:
    """Ways to a reward that was not earned."""
    found = run(["tests/test_swe.py", "tests/test_terminal.py", "tests/test_code.py", "-m", "hack"])
    figures = counted(case for cases in found.values() for case in cases.values())
    return Measured(figures["passed"] == figures["cases"] >= HACKS, figures)


def speed() -> Measured:
    """native against docker."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "sandbox.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "sandbox.py"), "--json", str(report)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(report.read_text())
    native, docker = found["native"], found["docker"]
    found["docker over native, cycle"] = round(docker["cycle, ms"] / native["cycle, ms"], 1)
    live = native["64 live"]
    left = [count for part in (native, docker) for name, count in part["left behind"].items() if name != "cycles"]
    met = found["docker over native, cycle"] >= 10 and native["command, ms"] < 2 and not any(left)
    return Measured(met and live["seconds"] <= 8 and live["MiB a box"] < 10, found)


def real_docker() -> Measured:
    """The tests that need Docker, none of them skipped."""
    found = run(
        [
            "tests/test_sandbox.py",
            "tests/test_sandbox_docker.py",
            "tests/test_terminal.py",
            "tests/test_sandbox_faults.py",
            "-k",
            "docker or container or daemon",
            "-m",
            "",
        ]
    )
    figures = counted(case for cases in found.values() for case in cases.values())
    return Measured(figures["passed"] == figures["cases"] > 0, figures)
