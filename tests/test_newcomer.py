"""A newcomer's own environment, with a tool and a Parquet file: checked, evaluated and trained on by its file's path.

`benchmarks/newcomer.py` does the same for bar 11.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("palaestra")
LINES = 40
ENVIRONMENT = '''
from pathlib import Path

from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.tasksets import rows


class Stock(Environment):
    """Answer how many of a thing are in stock."""

    tasks = rows(Path(__file__).with_name("stock.parquet"), prompt="question", answer="count", data={"thing": "thing"})

    @tool
    def count(self, thing: str) -> str:
        """The number of a thing in stock."""
        return self.task.data["answer"] if thing == self.task.data["thing"] else "0"

    @reward
    def correct(self, task, answer) -> float:
        return float(answer.strip() == task.data["answer"])

    def solution(self, task):
        return task.data["answer"]
'''.strip()
RECIPE = """
model = "warmstart"
[environments.stock]
use = "stock.py:Stock"
[evaluation]
tasks = 8
[pool]
groups = 4
[stages.rlvr]
loss = "rlvr"
steps = 2
""".strip()
COMMANDS = (
    "env check stock.py:Stock",
    "eval --policy scripted:gold --policy null --env stock.py:Stock --tasks 8",
    "train stock.toml",
)


def write(folder: Path) -> int:
    """Write the newcomer's files; returns the lines that he had to write."""
    from datasets import Dataset

    things = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cups", "pens", "keys", "nuts")]
    table = [
        {"question": f"Day {day}: how many {thing} are there?", "thing": thing, "count": str(7 * day + len(thing))}
        for day in range(20)
        for thing in things
    ]
    Dataset.from_list(table).to_parquet(folder / "stock.parquet")
    (folder / "stock.py").write_text(ENVIRONMENT)
    (folder / "stock.toml").write_text(RECIPE)
    return len((ENVIRONMENT + "\n" + RECIPE).splitlines())


def run(line: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """`palaestra LINE` in the newcomer's folder."""
    return subprocess.run([COMMAND, *line.split()], cwd=folder, capture_output=True, text=True, timeout=seconds)


@pytest.mark.timeout(600)
def test_an_environment_of_ones_own_is_checked_evaluated_and_trained_on(tmp_path):
    assert write(tmp_path) < LINES
    for line in COMMANDS:
        done = run(line, tmp_path, 300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    gold, null = json.loads((tmp_path / "runs" / "eval" / "summary.json").read_text())
    assert (gold["reward"]["mean"], null["reward"]["mean"]) == (1.0, 0.0)
    summary = json.loads((tmp_path / "runs" / "stock" / "summary.json").read_text())
    assert summary["environments"]["stock"]["tasks"] == 8
    assert len((tmp_path / "runs" / "stock" / "metrics.jsonl").read_text().splitlines()) == 2
