"""Task sets that are drawn from a seed: endless, split by a hash of their content, each task found again by its key."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from palaestra.gym.tasksets import SPLITS, split_of
from palaestra.gym.types import Source, Task


class Drawn(NamedTuple):
    """A task's content: what the policy reads and what the verifier needs."""

    prompt: str
    data: dict[str, Any]


Maker = Callable[[int, random.Random], Drawn]


class Generated:
    """The tasks that `make(level, generator)` draws, the levels in turn. Keys are `level-seed`."""

    def __init__(self, name: str, make: Maker, levels: Sequence[int]) -> None:
        self._source = Source(dataset=f"palaestra:{name}", licence="Apache-2.0")
        self._make = make
        self._levels = tuple(levels)

    def __call__(self, split: str, seed: int) -> Iterator[Task]:
        """The tasks of a split, without end, in the order that `seed` gives."""
        if split not in SPLITS:
            raise ValueError(f"generated tasks have the splits {' and '.join(SPLITS)}")
        generator = random.Random(f"{split}/{seed}")
        while True:
            for level in self._levels:
                yield self._next(level, split, generator)

    def get(self, key: str) -> Task:
        """The task of a key such as `2-123456`. Raises KeyError."""
        level, dash, seed = key.partition("-")
        if not dash or not level.isdigit() or not seed.isdigit():
            raise KeyError(f"{key!r} is no key of generated tasks; they look like 2-123456 (level, seed)")
        return self._task(int(level), int(seed))

    def _next(self, level: int, split: str, generator: random.Random) -> Task:
        while True:
            task = self._task(level, generator.getrandbits(48))
            if task.split == split:
                return task

    def _task(self, level: int, seed: int) -> Task:
        drawn = self._make(level, random.Random(f"{level}-{seed}"))
        content = json.dumps([drawn.prompt, drawn.data], sort_keys=True)
        return Task(
            key=f"{level}-{seed}",
            prompt=drawn.prompt,
            data=drawn.data,
            seed=seed,
            split=split_of(content),
            difficulty=level,
            source=self._source,
        )
