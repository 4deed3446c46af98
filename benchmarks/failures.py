"""Bars 6 and 7: what fails in mid-run costs no wrong score, and what was wrong is named in one line.

The measurements are the tests of `tests/test_failures.py`, slow ones included, run as a user would run them; what they
record is what is reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bars import ROOT, Measured

PYTEST = Path(sys.executable).with_name("pytest")
FILE = "tests/test_failures.py"
SECONDS = 3600
MID_RUN = {
    "actors killed in training": "test_actors_killed_in_training_cost_retries_and_no_zero",
    "actors killed in an evaluation": "test_actors_killed_in_an_evaluation_cost_no_score",
    "code that crashes its judge": "test_code_that_crashes_its_judge_is_scored_zero_and_the_next_reply_is_judged",
    "reply that kills a careless verifier": "test_a_reply_that_kills_a_careless_verifier_is_the_policys_doing",
    "tool failing 3 % of its calls, pool": "test_a_tool_that_fails_3_percent_of_its_calls_costs_retries_and_no_reward",
    "tool failing 3 % of its calls, eval": "test_an_evaluation_over_a_failing_tool_is_right_everywhere",
    "tool that is down": "test_a_tool_that_is_down_costs_scores_and_gives_none",
}
CLEAR = {
    "wrong recipe, data or model": "test_a_wrong_recipe_is_refused_in_one_line_and_nothing_is_left",
    "no recipe, no TOML": "test_no_recipe_and_no_toml_are_refused",
    "corrupt checkpoint": "test_a_corrupt_checkpoint_is_named_and_not_resumed",
    "advice for a corrupt checkpoint": "test_the_advice_for_a_corrupt_checkpoint_helps",
    "full disk at the head": "test_a_full_disk_at_the_head_of_a_run",
    "full disk at the metrics": "test_a_full_disk_at_the_first_row_of_metrics",
    "full disk at a checkpoint": "test_a_full_disk_at_a_checkpoint_in_mid_run",
    "full disk at the end": "test_a_full_disk_at_the_end_of_a_run",
}


def mid_run() -> Measured:
    """Bar 6: killed actors, replies that crash their verifier, a tool that fails."""
    return _measured(MID_RUN)


def clear_errors() -> Measured:
    """Bar 7: bad recipes, missing data, corrupt checkpoints, a full disk."""
    return _measured(CLEAR)


def _measured(parts: Mapping[str, str]) -> Measured:
    """Met where every part has passed: one that was skipped has not been measured."""
    cases = _run(list(parts.values()))
    figures = {part: _figures(cases.get(test, {})) for part, test in parts.items()}
    return Measured(all(part["passed"] == part["cases"] > 0 for part in figures.values()), figures)


def _run(tests: list[str]) -> dict[str, dict[str, ElementTree.Element]]:
    """The cases of each test, by test and case name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "", "-o", "junit_family=xunit1", "--junitxml", str(report)]
        command = [str(PYTEST), *options, *(f"{FILE}::{test}" for test in tests)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {(done.stdout + done.stderr)[-500:]}")
        found: dict[str, dict[str, ElementTree.Element]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, name = case.get("name", "").partition("[")
            found.setdefault(test, {})[name.removesuffix("]")] = case
        return found


def _figures(cases: Mapping[str, ElementTree.Element]) -> dict[str, Any]:
    """How many cases passed, why others did not, and what they recorded."""
    troubles = {name: trouble for name, case in cases.items() if (trouble := _trouble(case))}
    recorded = {name: _properties(case) for name, case in cases.items() if _properties(case)}
    figures: dict[str, Any] = {"cases": len(cases), "passed": len(cases) - len(troubles)}
    if troubles:
        figures["troubles"] = troubles
    return figures | (recorded.get("", {"seen": recorded}) if recorded else {})


def _trouble(case: ElementTree.Element) -> str:
    """Why a case failed or was skipped, in a line; empty where it passed."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {' '.join(found.get('message', '').replace(str(ROOT), '.').split())[:300]}"
    return ""


def _properties(case: ElementTree.Element) -> dict[str, Any]:
    return {entry.get("name", ""): json.loads(entry.get("value", "null")) for entry in case.iter("property")}
