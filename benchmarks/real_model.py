"""Bar 9, with a real model: SmolLM2-135M-Instruct evaluated on real rows, and trained on three environments at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bars import ROOT, Measured
from gold_rows import gold_rows
from learning import COMMAND, fingerprint, mean, train, wall_minutes

MODEL = ROOT / "models" / "smollm2"
ENVIRONMENTS = ("math", "code", "search")
SOURCES = {"math": "gsm8k", "code": "mbpp", "search": "hotpotqa"}
TASKS = 50
SECONDS = 6 * 3600


def fetched() -> Path:
    """The model's folder."""
    subprocess.run([str(COMMAND), "model", "fetch", "smollm2"], cwd=ROOT, check=True, timeout=SECONDS)
    return MODEL


def evaluated() -> dict[str, Any]:
    """Its greedy returns on the first rows of the train splits, none of which it was trained on here (the held-out
    tenth of MBPP and HotpotQA has fewer than 50); the same command again goes on where it stopped."""
    out = ROOT / "runs" / "bars" / fingerprint() / "smollm2-eval"
    chosen = [part for name in ENVIRONMENTS for part in ("--env", name)]
    keys = [f"environments.{name}.config.source={source}" for name, source in SOURCES.items()]
    command = [str(COMMAND), "eval", "--policy", f"transformers:{fetched()}", *chosen, "--tasks", str(TASKS),
               "--split", "train", "--temperature", "0", "--max-tokens", "256", "--out", str(out), *keys]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    found = json.loads((out / "summary.json").read_text())
    names = ("tasks", "unscored", "reward", "turns", "tool_calls", "tool_errors", "completion_tokens", "seconds")
    return {row["environment"]: {name: row[name] for name in names} for row in found}


def trained() -> dict[str, Any]:
    """Returns, groups with a signal, time and speed of `palaestra train smollm2`."""
    folder = train("smollm2", "smollm2")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in found[0] if name.startswith("reward/")]
    return {
        "steps": len(found),
        "episodes a step": min(row["episodes"] for row in found),
        "return": {name.removeprefix("reward/"): round(mean(row[name] for row in found), 3) for name in names},
        "groups with a signal": round(1 - mean(row["zero_advantage_share"] for row in found), 3),
        "minutes": round(wall_minutes(folder), 1),
        "sampled tokens a second": round(mean(row["sampled_tokens_per_second"] for row in found), 1),
    }


def real_input() -> Measured:
    """Both, run to the end, and the verdicts on all the rows that ship."""
    table, run, gold = evaluated(), trained(), gold_rows()
    met = gold.met and all(table[n]["tasks"] >= TASKS and not table[n]["unscored"] for n in ENVIRONMENTS)
    met = met and run["steps"] >= 5 and run["episodes a step"] >= 24
    return Measured(met, {"evaluation": table, "training": run, "gold rows": gold.figures})
