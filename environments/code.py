"""Functions to write, judged by tests in another process than the reply's."""

from __future__ import annotations

import random
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from palaestra.environments.code_judge import WALL_SECONDS, judge, judge_in_one_process
from palaestra.gym.environment import Environment, reward
from palaestra.gym.tasksets import rows
from palaestra.gym.types import Message, Task
from palaestra.gym.worker import worker
from palaestra.tasks.code import functions
from palaestra.tasks.real import humaneval, mbpp

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)

SOURCES = {"humaneval": humaneval, "mbpp": mbpp}


def source_of(reply: str) -> str:
    """The code of a reply: its last fenced block, else the whole."""
    blocks = FENCED.findall(reply)
    return str(blocks[-1] if blocks else reply)


def completed(prefix: str, entry_point: str, code: str) -> str:
    """The program that a reply means: it repeats the function, or continues the prefix where that breaks off."""
    if not prefix:
        return code
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{prefix.rstrip()}\n    pass\n\n\n{code}" if prefix.rstrip().endswith(('"""', "'''", ":")) else code
    return prefix + code


class Code(Environment):
    """Write a Python function. The code is the reply's last fenced block, else the whole reply."""

    class Config(BaseModel):
        """`source`: generator, humaneval, mbpp, or a JSONL or Parquet file with prompt, tests, entry_point, prefix;
        `levels` of the generated functions: a shape and `level` - 1 steps."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        source: str = "generator"
        levels: tuple[int, ...] = (1, 2, 3, 4)

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """Generated tasks, real ones, or the rows of a file."""
        if config.source == "generator":
            return functions(config.levels)
        if config.source in SOURCES:
            return SOURCES[config.source]()
        return rows(
            config.source,
            prompt="prompt",
            data={"tests": "tests", "entry_point": "entry_point", "prefix": lambda row: row.get("prefix", "")},
        )

    @reward
    async def passes(self, task: Task, answer: str) -> float:
        """1 if every test passes."""
        data = task.data
        source = completed(data.get("prefix", ""), data["entry_point"], source_of(answer))
        if data.get("one_process", False):
            verdict = await worker(judge_in_one_process, data["tests"], source, timeout=3 * WALL_SECONDS)
        else:
            known = (data["tests"], data["entry_point"], data.get("prefix", ""), source)
            verdict = await worker(judge, *known, timeout=3 * WALL_SECONDS)
        return float(verdict.passed)

    def solution(self, task: Task) -> str | None:
        """The function in its first way of writing; a row's own reference where it has one."""
        if "expressions" not in task.data:
            return task.data.get("solution")
        return _function(task, task.data["expressions"][0])

    def demonstrations(self, task: Task, generator: random.Random) -> list[Message]:
        """One of the right ways to write it."""
        if "expressions" not in task.data:
            return [Message(role="assistant", content=str(task.data["solution"]))]
        return [Message(role="assistant", content=_function(task, generator.choice(task.data["expressions"])))]


def _function(task: Task, expression: str) -> str:
    return f"def f({task.data['parameters']}):\n    return {expression}"
