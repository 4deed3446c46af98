"""Bars 5, 10 and 11: what a newcomer meets. Checks, the core install alone, an environment of one's own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import ROOT, Measured

sys.path.append(str(ROOT / "tests"))
import test_newcomer as own
from loopback import Server, adds

BIN = Path(sys.executable).parent
ENVIRONMENTS = ("math", "code", "search")
TESTS = "tests/test_gym_check.py"
SOUND = "test_a_sound_environment_passes_every_check"
BROKEN = "test_a_broken_environment_fails_with_the_name_of_its_fault"
FAULTS = {
    "gold fails": "gold fails",
    "reward differs on repeat": "reward differs on repeat",
    "tool hangs": "tool hangs",
    "close not idempotent": "close is not idempotent",
    "state shared between episodes": "state is shared",
    "a tool that raises": "tool raises",
    "one that leaks a process": "a tool leaks a process",
}
NEEDED = "python3.11"
PYTHONS = (NEEDED, "python3.12", "python3.13")
ABSENT = ("torch", "ray")
ROWS = '{"answer": "5", "reply": "5"}\n{"answer": "5", "reply": "6"}\n'
SECONDS = 1800
ROUNDS, LIST_SECONDS = 5, 1.0
MINUTES = 15.0


def checks() -> Measured:
    """Bar 5: what ships passes, and each fault is named."""
    found = {name: _trouble([BIN / "palaestra", "env", "check", name], ROOT) for name in ENVIRONMENTS}
    pytest = [BIN / "pytest", "-q"]
    found["a sound environment"] = _trouble([*pytest, f"{TESTS}::{SOUND}"], ROOT)
    found |= {fault: _trouble([*pytest, f"{TESTS}::{BROKEN}[{case}]"], ROOT) for fault, case in FAULTS.items()}
    return Measured(not any(found.values()), _states(found))


def core_install() -> Measured:
    """Bar 10: without torch and Ray, for each Python at hand; Python 3.11 must be."""
    figures = {name: _core(name) for name in PYTHONS}
    ran = [found for found in figures.values() if "works" in found]
    return Measured("works" in figures[NEEDED] and all(map(_works, ran)), figures)


def own_environment() -> Measured:
    """Bar 11: the README's files of less than 40 lines and its commands, within 15 minutes; also from fresh weights."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = own.write(folder)
        for line in (*own.COMMANDS, own.FRESH):
            own.run(line, folder, SECONDS)
        rewards, warm, fresh = own.evaluated(folder), own.trained(folder, "my"), own.trained(folder, "fresh")
    minutes = (time.monotonic() - started) / 60
    learned = warm["gain, low"] > 0 and warm["with a gradient"] > 0 and warm["steps"] == fresh["steps"] == 3
    met = lines < own.LINES and minutes < MINUTES and rewards == {"scripted:gold": 1.0, "null": 0.0} and learned
    figures = {"lines": lines, "minutes": round(minutes, 2), "eval": rewards, "trained": warm, "preset:tiny": fresh}
    return Measured(met, figures)


def _works(found: dict[str, Any]) -> bool:
    """Whether all went well in one fresh environment, and the list was quick."""
    return set(found["works"].values()) == {"ok"} and found["env list, seconds"] < LIST_SECONDS


def _states(troubles: dict[str, str]) -> dict[str, str]:
    return {name: trouble or "ok" for name, trouble in troubles.items()}


def _trouble(command: Sequence[Any], folder: Path) -> str:
    """The end of what a command printed if it failed, else nothing. No Python of the caller's reaches it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS, "env": environment}
    done = subprocess.run(list(map(str, command)), cwd=folder, **options)
    said = " ".join((done.stdout + done.stderr).replace(str(ROOT), ".").split())
    return f"status {done.returncode}: {said[-400:]}" if done.returncode else ""


def _interpreter(name: str) -> str | None:
    """A Python of that name that runs: on the path, or among those that pyenv keeps beside its default."""
    candidates = [shutil.which(name)]
    if shutil.which("pyenv"):
        kept = subprocess.run(["pyenv", "whence", "--path", name], capture_output=True, text=True, timeout=SECONDS)
        candidates += reversed(kept.stdout.split())
    return next((found for found in candidates if found and not _trouble([found, "--version"], ROOT)), None)


def _core(name: str) -> dict[str, Any]:
    """Install the core for one Python in a fresh environment, and use it."""
    python = _interpreter(name)
    if python is None:
        return {"not on this machine": name}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.monotonic()
        trouble = _install(python, folder)
        seconds = round(time.monotonic() - started)
        return {"works": {"install": trouble}} if trouble else {"install, seconds": seconds, **_used(folder)}


def _install(python: str, folder: Path) -> str:
    """A copy of the repository, without extras, into `folder/venv`. Returns what went wrong."""
    source, venv = folder / "source", folder / "venv"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "models", "*.egg-info"))
    pip = [venv / "bin" / "pip", "install", "--quiet", "--constraint", source / "constraints.txt", source]
    return _trouble([python, "-m", "venv", venv], folder) or _trouble(pip, folder)


def _used(folder: Path) -> dict[str, Any]:
    """What a newcomer does with the installed command, and how fast the list is."""
    python, command = (folder / "venv" / "bin" / name for name in ("python", "palaestra"))
    works = {f"no {name}": _present(python, name, folder) for name in ABSENT}
    (folder / "rows.jsonl").write_text(ROWS)
    score = [command, "env", "score", "sums.py", "--input", "rows.jsonl", "--output", "judged.jsonl"]
    works["env new"] = _trouble([command, "env", "new", "sums"], folder)
    works["env check"] = _trouble([command, "env", "check", "sums.py:Sums"], folder)
    works["env score"] = _trouble(score, folder) or _misjudged(folder / "judged.jsonl")
    with Server(adds) as server:
        policies = ["--policy", f"openai:m@{server.url}", "--policy", "null"]
        evaluate = [command, "eval", *policies, "--env", "sums.py", "--tasks", "8", "--out", "out"]
        works["eval"] = _trouble(evaluate, folder) or _misplayed(folder / "out" / "summary.json")
    works["env list"] = _trouble([command, "env", "list"], folder)
    return {"works": _states(works), "env list, seconds": round(_median([command, "env", "list"], folder), 2)}


def _present(python: Path, name: str, folder: Path) -> str:
    """What is wrong if a module can be imported there, or fails for another reason than its absence."""
    code = f"try:\n import {name}\nexcept ModuleNotFoundError:\n pass\nelse:\n raise SystemExit('{name} is there')"
    return _trouble([python, "-I", "-c", code], folder)


def _misjudged(path: Path) -> str:
    rewards = [json.loads(line)["reward"] for line in path.read_text().splitlines()]
    return "" if rewards == [1.0, 0.0] else f"rewards {rewards}, not [1.0, 0.0]"


def _misplayed(path: Path) -> str:
    """What is wrong unless the model that adds was right everywhere with a tool call a task, and silence never."""
    seen = [(row["reward"]["mean"], row["tool_calls"]) for row in json.loads(path.read_text())]
    return "" if seen == [(1.0, 1.0), (0.0, 0.0)] else f"(reward, tool calls) of openai and null: {seen}"


def _median(command: Sequence[Any], folder: Path) -> float:
    """The median of a command's seconds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        _trouble(command, folder)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)
