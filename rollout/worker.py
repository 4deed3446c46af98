"""Plays episodes: the plain object that an EnvironmentActor wraps, and that tests and small runs use as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from palaestra.gym.agent import MAIN, Loop
from palaestra.gym.episode import Bounds, run_episode
from palaestra.gym.policies import bound
from palaestra.gym.policy import Policy
from palaestra.gym.prototypes import Prototypes
from palaestra.gym.registry import EnvironmentSpec
from palaestra.gym.types import Episode, Sampling, Task


@dataclass(frozen=True)
class Work:
    """One episode to play: `id` and `sampling.seed` derive from what `provenance` holds."""

    id: str
    task: Task
    sampling: Sampling
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Player(Protocol):
    """Whoever plays an episode. Raises Failure when what should have played it died."""

    async def play(self, work: Work) -> Episode: ...


class Worker:
    """Plays many episodes at once. `specs` by alias; an environment's resources open with its first episode."""

    def __init__(
        self, specs: Mapping[str, EnvironmentSpec], policies: Mapping[str, Policy], bounds: Bounds | None = None
    ) -> None:
        self._prototypes = Prototypes(specs)
        self._policies = policies
        self._bounds = bounds or Bounds()

    async def play(self, work: Work) -> Episode:
        """Play one episode of `work.task.environment`."""
        environment = (await self._prototypes.of(work.task.environment)).fresh()
        policies = {**self._policies, MAIN: bound(self._policies[MAIN], environment, work.task)}
        return await run_episode(
            environment, Loop(), policies, work.task, work.sampling, work.id, self._bounds, work.provenance
        )

    async def close(self) -> None:
        """Shut what the environments opened. Idempotent."""
        await self._prototypes.close()
