"""Supervised data: the environments' own solutions, played through their real tools, as token sequences.

A demonstration is played as an episode is, with a policy that recites the solution in tokens; nothing is judged (`env
check` proves the solutions). So prompts, tool results and replies look exactly as they will in RLVR.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

import numpy as np

from palaestra.gym.agent import MAIN, Loop, Recorder
from palaestra.gym.environment import Environment, gold_messages
from palaestra.gym.episode import Bounds
from palaestra.gym.outcome import Cause
from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.prototypes import Prototypes
from palaestra.gym.registry import EnvironmentSpec, UsageError
from palaestra.gym.tools import Tools, as_messages, guarded
from palaestra.gym.types import Completion, Episode, Generation, Limits, Message, Sampling, Task, Turn
from palaestra.model.renderer import Renderer
from palaestra.rollout.pool import Tasks, shares
from palaestra.trainer.batch import Batch, Sample, paths

BOUNDS = Bounds(limits=Limits(turns=64, seconds=60), setup=60, tool=60, respond=60, close=60)


class Recital:
    """A token policy that says given messages in order. Its log-probabilities are 0: nothing drew the tokens."""

    def __init__(self, renderer: Renderer, messages: Sequence[Message]) -> None:
        self._renderer = renderer
        self._messages = list(messages)

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """The message whose place is the number of turns so far."""
        message = self._messages[len(path)]
        previous = [int(number) for turn in path for number in _ids(turn)]
        renderer, thinking = self._renderer, sampling.thinking
        prompt = renderer.extend(previous, new, thinking) if path else renderer.start(new, tools, thinking)
        ids = np.array(renderer.reply(message), np.int32)
        drawn = Generation(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), bool), ((0, len(ids)),), "stop")
        return Completion(message, np.array(prompt, np.int32), drawn)

    async def release(self, session: str) -> None:
        """Nothing is cached."""


def _ids(turn: Turn) -> Sequence[int]:
    prompt, drawn = turn.completion.prompt_ids, turn.completion.generation
    assert prompt is not None
    assert drawn is not None
    return [*prompt, *drawn.ids]


class Demonstrations:
    """An endless, resumable stream of supervised batches in the mix of the weights."""

    def __init__(
        self, specs: Mapping[str, EnvironmentSpec], weights: Mapping[str, float], renderer: Renderer, seed: int
    ) -> None:
        self._prototypes = Prototypes(specs)
        self._weights = weights
        self._renderer = renderer
        self._seed = seed
        self._tasks = {name: Tasks(spec, seed) for name, spec in specs.items()}

    async def batch(self, size: int, easy: bool = False) -> Batch:
        """The next `size` demonstrations; `easy`: only of each environment's lowest level. Raises UsageError."""
        chosen = []
        for name, count in shares(self._weights, size).items():
            chosen += self._easiest(name, count) if easy else self._tasks[name].take(count)
        played = await asyncio.gather(*(self._play(task) for task in chosen))
        return Batch([sample for samples in played for sample in samples])

    async def close(self) -> None:
        """Shut what the environments opened."""
        await self._prototypes.close()

    def state(self) -> dict[str, dict[str, int]]:
        """The cursors."""
        return {name: tasks.state() for name, tasks in self._tasks.items()}

    def load_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Move the cursors."""
        for name, cursor in state.items():
            self._tasks[name].load_state(cursor)

    def _easiest(self, name: str, count: int) -> list[Task]:
        """Tasks of the lowest level seen among many drawn."""
        drawn = self._tasks[name].take(8 * count)
        lowest = min(task.difficulty for task in drawn)
        easiest = [task for task in drawn if task.difficulty == lowest]
        return [easiest[place % len(easiest)] for place in range(count)]

    async def _play(self, task: Task) -> list[Sample]:
        environment = (await self._prototypes.of(task.environment)).fresh()
        environment.task = task
        bounds = BOUNDS.at_least(environment.deadlines(task))
        what = f"{task.environment}.setup"
        try:
            added = await guarded(what, Cause.ENVIRONMENT, bounds.setup, environment.setup, task)
            if added is not None:
                task = task.model_copy(update={"prompt": (*task.messages(), *as_messages(added))})
            tools = Tools(environment, bounds.tool, bounds.respond)
            policy = Recital(self._renderer, self._gold(environment, task))
            recorder = Recorder({MAIN: policy}, tools, Sampling(), task.key, bounds.limits)
            async with asyncio.timeout(bounds.limits.seconds):
                await Loop().run(task, tools, recorder)
        finally:
            await guarded(f"{task.environment}.close", Cause.ENVIRONMENT, bounds.close, environment.close)
        return paths(Episode(task.key, task, tuple(recorder.turns)), 1.0)

    def _gold(self, environment: Environment, task: Task) -> list[Message]:
        """One of the right ways to do the task: the environment's choice, always the same for the same task."""
        generator = random.Random(f"{self._seed} {task.environment} {task.key}")
        styles = getattr(environment, "demonstrations", None)
        options = None if styles is None else styles(task, generator)
        gold = gold_messages(environment.solution(task) if options is None else options)
        if gold is None:
            raise UsageError(
                f"environment {task.environment} has no solution for task {task.key}: nothing to learn from"
            )
        return gold
