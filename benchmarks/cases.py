"""Tests as measurements: run as a user would run them, slow ones included; what they record is what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bars import ROOT, Measured

PYTEST = Path(sys.executable).with_name("pytest")
SECONDS = 3600

Cases = dict[str, dict[str, ElementTree.Element]]
"""Cases by test and by the name in its brackets."""


def measured(parts: Mapping[str, str]) -> Measured:
    """Of tests by what they show, such as `tests/test_a.py::test_b`. Met where every part has passed: one that was
    skipped has not been measured."""
    cases = run([*parts.values(), "-m", ""])
    figures = {part: figures_of(cases.get(test.partition("::")[2], {})) for part, test in parts.items()}
    return Measured(all(part["passed"] == part["cases"] > 0 for part in figures.values()), figures)


def run(arguments: Sequence[str]) -> Cases:
    """What pytest with these arguments comes to. Raises RuntimeError where it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(PYTEST), "-q", "-o", "junit_family=xunit1", "--junitxml", str(report), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {(done.stdout + done.stderr)[-500:]}")
        found: Cases = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, name = case.get("name", "").partition("[")
            found.setdefault(test, {})[name.removesuffix("]")] = case
        return found


def figures_of(cases: Mapping[str, ElementTree.Element]) -> dict[str, Any]:
    """How many cases passed, why others did not, and what they recorded."""
    troubles = {name: why for name, case in cases.items() if (why := trouble(case))}
    recorded = {name: _properties(case) for name, case in cases.items() if _properties(case)}
    figures: dict[str, Any] = {"cases": len(cases), "passed": len(cases) - len(troubles)}
    if troubles:
        figures["troubles"] = troubles
    return figures | (recorded.get("", {"seen": recorded}) if recorded else {})


def counted(cases: Iterable[ElementTree.Element]) -> dict[str, Any]:
    """Passed, and the troubles of the others in a line each."""
    all_of = list(cases)
    troubles = [f"{case.get('name')}: {why}" for case in all_of if (why := trouble(case))]
    return {"cases": len(all_of), "passed": len(all_of) - len(troubles), "troubles": troubles}


def trouble(case: ElementTree.Element) -> str:
    """Why a case failed or was skipped, in a line; empty where it passed."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {' '.join(found.get('message', '').replace(str(ROOT), '.').split())[:300]}"
    return ""


def _properties(case: ElementTree.Element) -> dict[str, Any]:
    return {entry.get("name", ""): json.loads(entry.get("value", "null")) for entry in case.iter("property")}
