"""Code to write, to complete, to repair, to test and to read, judged in another process than the reply's."""

from __future__ import annotations

import random
import warnings
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from palaestra.environments.boxed import NEEDS
from palaestra.environments.code import kinds
from palaestra.environments.code.boxes import LIMITS, Boxes
from palaestra.environments.code.forks import UNCONTAINED, contained
from palaestra.environments.code.judge import SECONDS, Verdict, judge, judge_in_boxes
from palaestra.environments.code.literal import predicted
from palaestra.environments.sandbox.backends import Backend, BoxConfig, ready_backend
from palaestra.gym.environment import Environment, metric, reward
from palaestra.gym.types import Message, Task
from palaestra.gym.worker import worker
from palaestra.tasks import code
from palaestra.tasks.real import humaneval, mbpp

FORK = "fork"
GENERATED = {
    "generator": code.functions,
    "stdio": code.programs,
    "infilling": code.gaps,
    "prediction": code.predictions,
    "repair": code.repairs,
    "testwriting": code.suites,
}
REAL = {"humaneval": humaneval, "mbpp": mbpp}
SOURCES = (*GENERATED, *REAL)

FORK_SECONDS, BOX_SECONDS, LITERAL_SECONDS = 3 * SECONDS, 9 * SECONDS, 10.0
"""Within which a judgement comes to its end: the reply's time, the harness's, the boxes'."""


class Code(Environment):
    """Write a Python function, a program, a missing part, a repair or tests, or say what a program returns.

    The code is the reply's last fenced block, else the whole reply.
    """

    class Config(BaseModel):
        """`source`: generator (functions), stdio, infilling, prediction, repair, testwriting, humaneval, mbpp, or a
        JSONL or Parquet file (docs/verifiers.md has its columns); `levels` of the generated tasks; `backend`: where a
        reply runs, in a forked process (fork) or in the boxes of a sandbox backend (auto, native, docker), which are of
        an `image` with python3 in it."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        source: str = "generator"
        levels: tuple[int, ...] = (1, 2, 3, 4)
        backend: str = FORK
        image: str = "host"

        @model_validator(mode="after")
        def _no_image_without_boxes(self) -> Code.Config:
            if self.backend == FORK and "image" in self.model_fields_set:
                raise ValueError("image has no effect with backend fork; name a sandbox backend, or leave image out")
            return self

    _verdict = Verdict(False)

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """Generated tasks, real ones, or the rows of a file."""
        if config.source in GENERATED:
            return GENERATED[config.source](config.levels)
        return REAL[config.source]() if config.source in REAL else kinds.own(config.source)

    @classmethod
    async def open(cls, config: Any) -> Backend | None:
        """The sandbox, where replies run in one. Raises UsageError where it gives less than is needed."""
        if config.backend != FORK:
            boxes = BoxConfig(backend=config.backend, image=config.image, limits=LIMITS)
            return await ready_backend(boxes, NEEDS, ("python3",))
        if not contained():
            warnings.warn(UNCONTAINED, stacklevel=2)
        return None

    @classmethod
    async def shut(cls, resources: Any) -> None:
        """End it, and every box with it."""
        if resources is not None:
            await resources.close()

    @reward
    async def passes(self, task: Task, answer: str) -> float:
        """1 if every test passes, the value is right, or the reply's tests find every mutant."""
        self._verdict = await self._judged(dict(task.data), answer)
        return float(self._verdict.passed)

    @metric
    def mutants_found(self) -> float | None:
        """Of a reply's tests, the share of the mutants that they find."""
        return self._verdict.share

    async def _judged(self, data: dict[str, Any], answer: str) -> Verdict:
        if kinds.kind_of(data) == "prediction":
            known = (data["answer"], answer, data.get("equal_numbers", False))
            return Verdict(await worker(predicted, *known, timeout=LITERAL_SECONDS))
        source = kinds.source_of(answer)
        if self.config.backend == FORK:
            return await worker(judge, data, source, timeout=FORK_SECONDS)  # type: ignore[no-any-return]
        async with Boxes(self.resources, self.config.image) as boxes:
            return await worker(  # type: ignore[no-any-return]
                judge_in_boxes, data, source, timeout=BOX_SECONDS, answers=boxes.answer
            )

    def solution(self, task: Task) -> str | None:
        """The task's own, where it has one: of a generated function its first way of writing."""
        if "expressions" in task.data:
            return _function(task, task.data["expressions"][0])
        return task.data.get("solution", task.data.get("answer"))

    def demonstrations(self, task: Task, generator: random.Random) -> list[Message]:
        """One of the right ways to write it."""
        if "expressions" not in task.data:
            return [Message(role="assistant", content=str(self.solution(task)))]
        return [Message(role="assistant", content=_function(task, generator.choice(task.data["expressions"])))]


def _function(task: Task, expression: str) -> str:
    return f"def f({task.data['parameters']}):\n    return {expression}"
