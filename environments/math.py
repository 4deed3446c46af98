"""Mathematics with a checked answer, and a calculator at hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from palaestra.environments.calculator import calculate
from palaestra.environments.equivalence import equivalent, quick
from palaestra.gym.environment import Environment, ToolError, reward, tool
from palaestra.gym.tasksets import rows
from palaestra.gym.types import Message, Task
from palaestra.gym.worker import worker
from palaestra.tasks.math import word_problems
from palaestra.tasks.real import competition, gsm8k

JUDGE_SECONDS = 20.0

SOURCES = {"gsm8k": gsm8k, "math": competition}


class Math(Environment):
    r"""Answer a mathematical question. The answer is the last \boxed, else the last line, of the reply."""

    class Config(BaseModel):
        """`source`: generator, gsm8k, math, or a JSONL or Parquet file with prompt and answer;
        `levels`: steps of the generated problems; `tools`: whether there is a calculator; `direct`: the share of
        demonstrations that answer without it."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        source: str = "generator"
        levels: tuple[int, ...] = (1, 2)
        tools: bool = True
        direct: float = 0.35

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """Generated tasks, real ones, or the rows of a file."""
        if config.source == "generator":
            return word_problems(config.levels)
        if config.source in SOURCES:
            return SOURCES[config.source]()
        return rows(
            config.source,
            prompt="prompt",
            answer="answer",
        )

    @tool
    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression such as 3*(4+5)."""
        try:
            return calculate(expression)
        except ValueError as error:
            raise ToolError(str(error)) from None

    def tool_names(self) -> Sequence[str]:
        """The calculator, unless it was taken away."""
        return ("calculate",) if self.config.tools else ()

    @reward
    async def correct(self, task: Task, answer: str) -> float:
        """1 if the answer is equivalent to the task's."""
        verdict = quick(task.data["answer"], answer)
        if verdict is None:
            verdict = await worker(equivalent, task.data["answer"], answer, timeout=JUDGE_SECONDS)
        return float(verdict)

    def solution(self, task: Task) -> list[Message]:
        """By the calculator where the task knows its expression and there is one, else the answer."""
        answer = Message(role="assistant", content=str(task.data["answer"]))
        if not self.config.tools or "expression" not in task.data:
            return [answer]
        return [Message.calling("calculate", expression=task.data["expression"]), answer]

    def demonstrations(self, task: Task, generator: random.Random) -> list[Message]:
        """The solution, or for a share of the tasks its answer alone."""
        messages = self.solution(task)
        return messages[-1:] if generator.random() < self.config.direct else messages
