"""`palaestra env new`: an environment that works, with its test, to be changed into one's own."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from palaestra.gym.registry import UsageError

_ENVIRONMENT = '''from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.tasksets import rows
from palaestra.gym.types import Source

SUMS = [{{"ask": f"What is {{a}} + {{b}}?", "sum": str(a + b)}} for a in range(20, 60) for b in range(20, 60)]


class {name}(Environment):
    """Answer a sum: replace the rows (also a JSONL or Parquet file), the tool and the reward by your own."""

    tasks = rows(SUMS, prompt="ask", answer="sum", origin=Source(dataset="sums"))

    @tool
    def add(self, a: int, b: int) -> int:
        """Add two integers."""
        return a + b

    @reward
    def correct(self, task, answer) -> float:
        return float(answer.strip() == task.data["answer"])

    def solution(self, task):
        return task.data["answer"]
'''
_TEST = """import asyncio
from pathlib import Path

from palaestra.gym.check import check
from palaestra.gym.registry import spec


def test_{module}():
    findings = asyncio.run(check(spec(f"{{Path(__file__).parent / '{module}.py'}}:{name}")))
    assert not [finding.message for finding in findings if not finding.ok]
"""


def new(name: str, folder: Path) -> list[Path]:
    """Write NAME.py and test_NAME.py into `folder`; together under 40 lines.

    Raises UsageError, and overwrites nothing.
    """
    module = name.replace("-", "_").lower()
    if not module.isidentifier() or keyword.iskeyword(module):
        raise UsageError(f"env new {name}: not a Python name; use letters, digits and underscores")
    if module in sys.stdlib_module_names:
        raise UsageError(f"env new {name}: Python has a module {module} of its own; choose another name")
    title = "".join(part.capitalize() for part in module.split("_"))
    fields = {"name": title, "module": module}
    files = {folder / f"{module}.py": _ENVIRONMENT, folder / f"test_{module}.py": _TEST}
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists; choose another name or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text.format(**fields), encoding="utf-8")
    return list(files)
