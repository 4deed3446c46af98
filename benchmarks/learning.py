"""Bars 1 to 4: what a policy learns, that the verifier teaches it, and that numbers can be had again.

Whole runs of the shipped recipes go to `runs/bars/FINGERPRINT/LABEL`, where FINGERPRINT is a hash of the package: a run
that has ended is not run again, and one that was cut off is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bars import ROOT, Measured
from safetensors.numpy import load_file

COMMAND = Path(sys.executable).with_name("palaestra")
FOLDERS = ("gym", "environments", "tasks", "kernels", "model", "rollout", "trainer")
SEEDS = (0, 1, 2)
MODES = ("mean", "greedy")
SECONDS = 7200
Z95 = 1.959964
TIMES = ("seconds", "tokens_per_second", "idle_share", "elapsed")


def fingerprint() -> str:
    """A hash of everything that the package's numbers depend on."""
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    known = [path for path in files if "__pycache__" not in path.parts]
    return hashlib.sha256(b"".join(path.read_bytes() for path in known)).hexdigest()[:12]


def train(label: str, recipe: str, *overrides: str) -> Path:
    """The folder of a finished run; runs it, or goes on with it, where it is not there yet."""
    runs = ROOT / "runs" / "bars" / fingerprint()
    folder = runs / label
    if not (folder / "summary.json").exists():
        runs.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (folder / "recipe.json").exists() else []
        if not resume:
            _started(folder).touch()
        command = [str(COMMAND), "train", recipe, f"name={label}", *overrides, "--runs", str(runs), *resume]
        print("  " + " ".join(["palaestra", *command[1:5]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    return folder


def _started(folder: Path) -> Path:
    """A file beside a run's folder, as old as the run's first start."""
    return folder.with_name(f"{folder.name}.started")


def wall_minutes(folder: Path) -> float:
    """From a run's first start to its summary: a resumed run's pauses count too."""
    return ((folder / "summary.json").stat().st_mtime - _started(folder).stat().st_mtime) / 60


def read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run."""
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def rows(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, less what measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if not name.endswith(TIMES)} for line in lines]


def quickstart(seed: int, kind: str = "nvfp4", *overrides: str) -> Path:
    """A run of the quickstart."""
    return train(f"{kind}-{seed}", "quickstart", f"seed={seed}", *overrides)


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    found = list(values)
    return sum(found) / len(found)


def gains(folder: Path) -> dict[str, Any]:
    """A run's gains by environment and in the mean, the minutes that it took, and the gains by level."""
    summary = read(folder, "summary.json")
    parts = summary["environments"]
    return {
        "environments": {
            name: {
                "tasks": part["tasks"],
                **{f"before {mode}": round(part["before"][mode], 3) for mode in MODES},
                **{f"after {mode}": round(part["after"][mode], 3) for mode in MODES},
                "gain": [round(part["gain"][key], 3) for key in ("mean", "low", "high")],
                "greedy gain": round(part["greedy_gain"]["mean"], 3),
                "gain by level": {level: round(g["mean"], 3) for level, g in summary["levels"][name].items()},
            }
            for name, part in parts.items()
        },
        "mean gain": round(mean(part["gain"]["mean"] for part in parts.values()), 3),
        "mean greedy gain": round(mean(part["greedy_gain"]["mean"] for part in parts.values()), 3),
        "minutes": round(wall_minutes(folder), 1),
    }


class Demands(NamedTuple):
    """What a run must gain in each environment and in the mean, and in how many minutes."""

    each: float
    mean: float
    minutes: float


THREE, FOUR = Demands(0.10, 0.20, 15), Demands(0.08, 0.15, 20)
"""Without and with the terminal."""


def learns(found: Mapping[str, Any]) -> list[str]:
    """Which of bar 1's conditions a run misses."""
    demands = FOUR if "terminal" in found["environments"] else THREE
    missed = []
    for name, part in found["environments"].items():
        checks = {
            "500 tasks": part["tasks"] >= 500,
            "before within .15 and .75": 0.15 <= part["before mean"] <= 0.75,
            f"gain of {demands.each:.2f}": part["gain"][0] >= demands.each,
            "interval above zero": part["gain"][1] > 0,
            "greedy falls by .05 at most": part["greedy gain"] >= -0.05,
        }
        missed += [f"{name}: {check}" for check, holds in checks.items() if not holds]
    checks = {
        f"mean gain of {demands.mean:.2f}": found["mean gain"] >= demands.mean,
        "mean greedy gain of .05": found["mean greedy gain"] >= 0.05,
        f"{demands.minutes} minutes": found["minutes"] <= demands.minutes,
    }
    return missed + [check for check, holds in checks.items() if not holds]


def _stage_minutes(folder: Path) -> float:
    """What the training stage of a run took."""
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["elapsed"]) / 60


def toolless_search(model: Path) -> float:
    """The return of held-out search tasks with the tools taken away."""
    out = model.parent / "toolless"
    command = [str(COMMAND), "eval", "--policy", f"model:{model}", "--env", "search", "--tasks", "500",
               "--out", str(out), "environments.search.config.tools=false"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    (row,) = json.loads((out / "summary.json").read_text())
    return float(row["reward"]["mean"])


def three_seeds() -> Measured:
    """Three seeds learn, and so does one from a warm start rebuilt with another seed; the control is shown beside."""
    runs = {f"seed {seed}": gains(quickstart(seed)) for seed in SEEDS}
    again = train("warmstart-1", "warmstart", "seed=1")
    runs["rebuilt warm start"] = gains(quickstart(0, "rebuilt", f'model="{again / "model"}"'))
    float32 = {f"seed {seed}": gains(quickstart(seed, "float32", "nvfp4=false")) for seed in SEEDS}
    minutes = _stage_minutes(quickstart(0))
    control = gains(train("control", "control", f"stages.sft.minutes={minutes:.2f}"))
    missed = {name: learns(run) for name, run in runs.items()}
    toolless = toolless_search(quickstart(0) / "model")
    loss = mean(run["mean gain"] for run in float32.values()) - mean(runs[f"seed {s}"]["mean gain"] for s in SEEDS)
    warm_minutes = wall_minutes(again)
    figures = {
        "runs": runs,
        "missed": missed,
        "float32": float32,
        "control": control,
        "search without tools": toolless,
        "float32 minus NVFP4": round(loss, 3),
        "warm start, minutes": round(warm_minutes, 1),
    }
    shutil.copy(quickstart(0) / "curves.png", ROOT / "docs" / "curves.png")
    met = not any(missed.values()) and toolless < 0.10 and loss <= 0.08 and warm_minutes <= 90
    return Measured(met, figures)


def difference(real: Path, other: Path, name: str) -> list[float]:
    """Return after the real run minus that after another, at temperature 1, with its 95 % interval paired by task."""
    ours, theirs = (read(folder, "scores.json")["after"][name]["mean"] for folder in (real, other))
    found = np.array([ours[key] - theirs[key] for key in ours if key in theirs])
    half = Z95 * float(found.std(ddof=1)) / len(found) ** 0.5
    return [round(float(found.mean()) + side, 3) for side in (0.0, -half, half)]


def permuted_rewards() -> Measured:
    """Rewards permuted at random teach nothing."""
    real, permuted = quickstart(0), train("permuted", "quickstart", "stages.rlvr.permute_rewards=true")
    found = gains(permuted)
    apart = {name: difference(real, permuted, name) for name in found["environments"]}
    met = found["mean gain"] <= 0.05 and all(low > 0 for _, low, _ in apart.values())
    return Measured(met, {"permuted": found, "real minus permuted": apart, "real": gains(real)["mean gain"]})


SMALL = ("deterministic=true", "stages.rlvr.steps=6", "pool.groups=6", "pool.group_size=4", "evaluation.tasks=12",
         "checkpoint.every=1")  # fmt: skip


def determinism() -> Measured:
    """Two deterministic runs are equal, and one that is killed at three random moments and resumed equals them."""
    plain = [train(f"deterministic-{n}", str(_without_minutes()), *SMALL) for n in (1, 2)]
    killed, kills = _killed_and_resumed("deterministic-killed", random.Random(time.time_ns()))
    first, second, third = (_numbers(folder) for folder in (*plain, killed))
    figures = {"rows": len(first[0]), "two runs equal": first == second, "killed run equal": first == third,
               "kills at step": kills}  # fmt: skip
    return Measured(first == second == third and len(first[0]) == 6, figures)


def _numbers(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """All that must be equal: metrics, held-out scores, weights."""
    weights = load_file(folder / "model" / "model.safetensors")  # the file's header has its keys in no fixed order
    parts = [name.encode() + weights[name].tobytes() for name in sorted(weights)]
    return rows(folder), read(folder, "scores.json"), hashlib.sha256(b"".join(parts)).hexdigest()


def _without_minutes() -> Path:
    """The quickstart's recipe, less the clock: a deterministic run refuses to end by it."""
    text = (ROOT / "trainer" / "recipes" / "quickstart.toml").read_text()
    path = ROOT / "runs" / "bars" / fingerprint() / "deterministic.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line for line in text.splitlines(True) if not line.startswith("minutes")))
    return path


def _killed_and_resumed(label: str, chance: random.Random) -> tuple[Path, list[int]]:
    """Start a run, kill its process group after a random number of further steps, three times; then let it end."""
    folder = ROOT / "runs" / "bars" / fingerprint() / label
    shutil.rmtree(folder, ignore_errors=True)
    kills: list[int] = []
    for _ in range(3):
        wanted = _steps(folder) + chance.randint(0, 1)
        process = _start(label, folder)
        while process.poll() is None and _steps(folder) < wanted + 1:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run {folder} ended before it was killed")
        kills.append(_steps(folder))
    process = _start(label, folder)
    if process.wait(timeout=SECONDS) != 0:
        raise RuntimeError(f"the resumed run {folder} failed")
    return folder, kills


def _start(label: str, folder: Path) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if (folder / "recipe.json").exists() else []
    recipe = str(_without_minutes())
    command = [str(COMMAND), "train", recipe, f"name={label}", *SMALL, "--runs", str(folder.parent), *resume]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_logprobs() -> Measured:
    """The trainer's log-probabilities of sampled tokens are the sampler's."""
    figures: dict[str, Any] = {}
    met = True
    for kind, switch in (("nvfp4", "true"), ("float32", "false")):
        folder = train(f"gap-{kind}", "quickstart", f"nvfp4={switch}", "stages.rlvr.steps=3", "evaluation.tasks=0")
        found = rows(folder)
        gap = max(row["logprob_gap"] for row in found)
        figures[kind] = {"mean |gap|": gap, "99.9th percentile": max(row["logprob_gap_p999"] for row in found),
                         "tokens": sum(row["tokens"] for row in found)}  # fmt: skip
        met = met and gap < 1e-5 and all({"mismatch_kl", "importance_clipped"} <= set(row) for row in found)
    return Measured(met, figures)
