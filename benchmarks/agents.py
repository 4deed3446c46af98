"""Bar 9 of group sandbox: an agent of another make, and a real model in boxes."""

from __future__ import annotations

import json
import subprocess

from bars import ROOT, Measured
from cases import measured
from learning import COMMAND, fingerprint
from real_model import fetched

SCRIPT = "tests/test_agents.py::test_an_openai_script_is_judged_by_what_it_leaves_in_the_box"
TASKS = 20
SECONDS = 6 * 3600


def real_agents() -> Measured:
    """Both."""
    script = measured({"openai script": SCRIPT})
    out = ROOT / "runs" / "bars" / fingerprint() / "smollm2-boxes"
    command = [str(COMMAND), "eval", "--policy", f"transformers:{fetched()}", "--env", "terminal", "--env", "swe",
               "--tasks", str(TASKS), "--split", "train", "--temperature", "0", "--max-tokens", "128",
               "--out", str(out)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    rows = json.loads((out / "summary.json").read_text())
    names = ("tasks", "unscored", "reward", "turns", "tool_calls", "tool_errors", "completion_tokens", "seconds")
    table = {row["environment"]: {name: row[name] for name in names} for row in rows}
    met = script.met and all(row["tasks"] >= TASKS and not row["unscored"] for row in table.values())
    return Measured(met, {"agent": script.figures, "SmolLM2": table})
