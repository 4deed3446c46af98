"""Bars 5, 10 and 11: what a newcomer meets. Checks, the core install alone, an environment of one's own."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bars import ROOT, Measured

sys.path.append(str(ROOT / "tests"))
import test_newcomer as own
from loopback import Server, adds

COMMAND = Path(sys.executable).with_name("palaestra")
ENVIRONMENTS = ("math", "code", "search")
FAULTS = {
    "gold fails": "gold fails",
    "reward differs on repeat": "reward differs on repeat",
    "tool hangs": "tool hangs",
    "close not idempotent": "close is not idempotent",
    "state shared between episodes": "state is shared",
    "a tool that raises": "tool raises",
    "one that leaks a process": "a tool leaks a process",
}
PYTHONS = ("python3.11", "python3.12", "python3.13")
SECONDS = 1800
ROUNDS = 5


def checks() -> Measured:
    """Bar 5: what ships passes, and each fault is named."""
    found: dict[str, Any] = {name: _ok([COMMAND, "env", "check", name], ROOT) for name in ENVIRONMENTS}
    test = "tests/test_gym_check.py::test_a_broken_environment_fails_with_the_name_of_its_fault"
    pytest = [Path(sys.executable).with_name("pytest"), "-q"]
    found |= {fault: _ok([*pytest, f"{test}[{case}]"], ROOT) for fault, case in FAULTS.items()}
    return Measured(all(found.values()), found)


def core_install() -> Measured:
    """Bar 10: without torch and Ray, for each Python at hand."""
    figures: dict[str, Any] = {}
    for name in PYTHONS:
        python = _interpreter(name)
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = _core(python, Path(folder)) if python else "not on this machine"
    ran = [found for found in figures.values() if isinstance(found, dict)]
    met = bool(ran) and all(all(f["works"].values()) and f["env list, seconds"] < 1 for f in ran)
    return Measured(met, figures)


def own_environment() -> Measured:
    """Bar 11: files of less than 40 lines, three commands, 15 minutes."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        lines = own.write(Path(scratch))
        works = {line: own.run(line, Path(scratch), SECONDS).returncode == 0 for line in own.COMMANDS}
    minutes = (time.monotonic() - started) / 60
    met = all(works.values()) and lines < own.LINES and minutes < 15
    return Measured(met, {"lines": lines, "minutes": round(minutes, 1), "works": works})


def _interpreter(name: str) -> Path | None:
    """A Python of that name: pyenv keeps those that are not its default beside its shims."""
    kept = sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}"))
    found = shutil.which(name)
    return kept[-1] if kept else Path(found) if found else None


def _ok(command: list[Any], folder: Path) -> bool:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        print(f"  {command[0]} failed: {(done.stdout + done.stderr)[-400:]}", flush=True)
    return done.returncode == 0


def _core(python: Path, folder: Path) -> dict[str, Any]:
    """Install the core in a fresh environment and use it as the README does."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "models", "*.egg-info"))
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True, timeout=SECONDS)
    pip = [folder / "venv" / "bin" / "pip", "install", "--quiet", "--constraint", source / "constraints.txt", source]
    subprocess.run(list(map(str, pip)), check=True, timeout=SECONDS, capture_output=True)
    command = folder / "venv" / "bin" / "palaestra"
    works = {f"no {name}": not _imports(folder, name) for name in ("torch", "ray")}
    works |= {name: _ok([command, *arguments], folder) for name, arguments in _uses(folder).items()}
    with Server(adds) as server:
        policy = f"openai:m@{server.url}"
        asked = [command, "eval", "--policy", policy, "--env", "sums.py", "--tasks", "8", "--out", "out"]
        works["eval"] = _ok(asked, folder) and _adds(folder / "out" / "summary.json")
    return {"works": works, "env list, seconds": round(_median([command, "env", "list"], folder), 2)}


def _imports(folder: Path, name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    done = subprocess.run([folder / "venv" / "bin" / "python", "-I", "-c", code], timeout=SECONDS)
    return done.returncode == 0


def _uses(folder: Path) -> dict[str, list[str]]:
    (folder / "rows.jsonl").write_text('{"answer": "5", "reply": "5"}\n{"answer": "5", "reply": "6"}\n')
    return {
        "env new": ["env", "new", "sums"],
        "env check": ["env", "check", "sums.py:Sums"],
        "env score": ["env", "score", "sums.py", "--input", "rows.jsonl", "--output", "judged.jsonl"],
    }


def _adds(summary: Path) -> bool:
    """Whether the model that adds was right everywhere, a tool call a task."""
    (row,) = json.loads(summary.read_text())
    return bool(row["reward"]["mean"] == 1.0 and row["tool_calls"] == 1.0)


def _median(command: list[Any], folder: Path) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        _ok(command, folder)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)
