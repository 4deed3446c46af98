"""A newcomer's own environment, with a tool and a Parquet file: checked, evaluated and trained on, as the README says.

Files and commands are the README's own. `benchmarks/newcomer.py` does the same for bar 11.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
FILES: dict[str, str] = dict(re.findall(r"^```\w+ (\S+\.\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
(TYPED,) = re.findall(r"^```console own\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS: list[str] = TYPED.splitlines()
FRESH = "palaestra train my.toml model=preset:tiny name=fresh"
LINES = 40


def write(folder: Path) -> int:
    """Write the README's files; returns the lines of the environment and of the recipe."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return sum(len(FILES[name].splitlines()) for name in ("arithmetic.py", "my.toml"))


def run(line: str, folder: Path, seconds: float) -> None:
    """Type a command of the README in the newcomer's folder. Raises AssertionError with what it printed."""
    program, *arguments = shlex.split(line)
    done = subprocess.run([BIN / program, *arguments], cwd=folder, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise AssertionError(f"{line}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def evaluated(folder: Path) -> dict[str, float]:
    """The mean reward of each policy in `runs/eval`."""
    rows = json.loads((folder / "runs" / "eval" / "summary.json").read_text())
    return {row["policy"]: row["reward"]["mean"] for row in rows}


def trained(folder: Path, name: str) -> dict[str, Any]:
    """The gain over the held-out tasks, the reinforcement steps, and in how many of them there was a gradient."""
    run = folder / "runs" / name
    gain = json.loads((run / "summary.json").read_text())["environments"]["arithmetic"]["gain"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    learned = [step["grad_norm"] > 0 for step in steps if step["stage"] == "rlvr"]
    return {"gain": gain["mean"], "gain, low": gain["low"], "steps": len(learned), "with a gradient": sum(learned)}


@pytest.mark.timeout(600)
def test_an_environment_of_ones_own_is_checked_evaluated_and_trained_on(tmp_path):
    assert write(tmp_path) < LINES
    for line in COMMANDS:
        run(line, tmp_path, 300)
    assert evaluated(tmp_path) == {"scripted:gold": 1.0, "null": 0.0}
    found = trained(tmp_path, "my")
    assert found["gain, low"] > 0
    assert found["steps"] == 3
    assert found["with a gradient"] > 0


def test_a_command_that_fails_is_named_with_what_it_printed(tmp_path):
    write(tmp_path)
    with pytest.raises(AssertionError, match=r"env check arithmetic.py: status 1(.|\n)*no data file"):
        run("palaestra env check arithmetic.py", tmp_path, 100)
