"""The pool: admits rounds of episodes under the staleness bound, and hands out each round's groups.

A round is what one training step learns from: for each environment, in the proportion of its weight, some tasks, each
played `group_size` times. Round r may start once the policy's version is at least r - staleness. So the mix of
environments is its target exactly, and no episode is older than the bound allows.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from palaestra.gym.outcome import RULES, Cause, Failure
from palaestra.gym.registry import EnvironmentSpec, UsageError
from palaestra.gym.types import Episode, Group, Outcome, Sampling, Task, Unscored
from palaestra.rollout.worker import Player, Work

Deliver = Callable[[Any, int], Awaitable[None]]

STOP_AFTER = 200
"""Episodes before the share of environment errors can stop a run."""


class PoolConfig(BaseModel):
    """How much is played, how far ahead, and when to give up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int = Field(default=48, ge=1, description="tasks a step, over all environments")
    group_size: int = Field(default=8, ge=1, description="episodes a task")
    staleness: int = Field(default=1, ge=0, description="how many updates behind a round's policy may be at its start")
    round_seconds: float = Field(default=900, gt=0, description="deadline of a round")
    error_share: float = Field(default=0.01, ge=0, le=1, description="environment errors above which the run stops")
    lost_share: float = Field(default=0.5, gt=0, le=1, description="unscored episodes above which the run stops")


class PoolError(RuntimeError):
    """The pool cannot go on; the text says what failed and where."""


class Tasks:
    """An endless run through one environment's training tasks, with a cursor that can be saved.

    A finite set is passed through again and again, each time in the order of another seed.
    """

    def __init__(self, spec: EnvironmentSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        self._epoch = self._position = 0
        self._tasks = spec.tasks("train", seed)

    def take(self, n: int) -> list[Task]:
        """The next n trainable tasks. Raises UsageError where there is none."""
        taken: list[Task] = []
        while len(taken) < n:
            task = next(self._tasks, None)
            if task is None:
                self._next_epoch()
                continue
            self._position += 1
            if task.source.trainable:
                taken.append(task)
                self._fruitful = self._epoch
        return taken

    _fruitful = -1

    def _next_epoch(self) -> None:
        if self._fruitful < self._epoch:
            raise UsageError(f"environment {self._spec.alias}: none of its train tasks may be trained on")
        self._epoch, self._position = self._epoch + 1, 0
        self._tasks = self._spec.tasks("train", self._seed + self._epoch)

    def state(self) -> dict[str, int]:
        """Where the cursor stands."""
        return {"epoch": self._epoch, "position": self._position, "fruitful": self._fruitful}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Move the cursor there."""
        self._epoch, self._position, self._fruitful = state["epoch"], state["position"], state["fruitful"]
        self._tasks = self._spec.tasks("train", self._seed + self._epoch)
        next(itertools.islice(self._tasks, self._position, self._position), None)


def shares(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` in proportion to the weights, by largest remainder; ties go to the first name."""
    scale = total / sum(weights.values())
    exact = {name: weight * scale for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(eq=False)
class _Round:
    """A round: its tasks, and what its episodes have come to so far (by task and sample)."""

    number: int
    tasks: list[Task]
    done: dict[tuple[int, int], Episode] = field(default_factory=dict)
    running: dict[tuple[int, int], asyncio.Task[None]] = field(default_factory=dict)

    def groups(self, size: int) -> list[Group]:
        return [
            Group(task, self.number, [self.done[index, sample] for sample in range(size)])
            for index, task in enumerate(self.tasks)
        ]


@dataclass(frozen=True)
class Draw:
    """What an episode's id and seed derive from, besides its place: the recipe's seed, and the phase of the run."""

    seed: int
    phase: str = "rlvr"
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)


def identity(*parts: object) -> str:
    """A short hash of what identifies an episode."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def work(draw: Draw, round_number: int, task: Task, sample: int, attempt: int) -> Work:
    """The work of one attempt. The seed does not depend on the attempt."""
    place = (draw.seed, draw.phase, round_number, task.environment, task.key, sample)
    names = ("seed", "phase", "round", "environment", "task", "sample")
    seed = int(identity("sampling", *place)[:15], 16)
    return Work(
        id=identity(*place, attempt),
        task=task,
        sampling=draw.sampling.model_copy(update={"seed": seed}),
        provenance={**dict(zip(names, place, strict=True)), "attempt": attempt},
    )


async def played(
    player: Player, draw: Draw, round_number: int, task: Task, sample: int, retried: Counter[str]
) -> Episode:
    """One episode, played again as often as its outcome's rule allows; `retried` counts the causes."""
    for attempt in itertools.count():
        episode = await _attempt(player, work(draw, round_number, task, sample, attempt))
        cause = episode.outcome.cause
        if attempt >= RULES[cause].retries:
            return episode
        retried[cause.value] += 1
    raise AssertionError("unreachable")


async def _attempt(player: Player, work: Work) -> Episode:
    """Play one attempt; where its player died, an episode without a score that says so."""
    try:
        return await player.play(work)
    except Failure as failure:
        lost = Unscored(cause=failure.cause, detail=failure.detail)
        outcome = Outcome(cause=failure.cause, detail=failure.detail)
        return Episode(work.id, work.task, result=lost, outcome=outcome, provenance=work.provenance)


class Pool:
    """Collects groups. `weights` says how much of each environment; `player` plays one episode at a time, many at once.

    `deliver` hands weights and their version to the engines. `lockstep`: a round is played to its
    end, started in the order of (task key, sample), before anything else happens (deterministic runs).
    """

    def __init__(
        self,
        specs: Mapping[str, EnvironmentSpec],
        weights: Mapping[str, float],
        player: Player,
        config: PoolConfig,
        draw: Draw,
        deliver: Deliver | None = None,
        lockstep: bool = False,
    ) -> None:
        self.config = config
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.retried: Counter[str] = Counter()
        self.version = 0
        self._deliver = deliver
        self._player = player
        self._draw = draw
        self._lockstep = lockstep
        self._shares = shares(weights, config.groups)
        self._tasks = {name: Tasks(spec, draw.seed) for name, spec in specs.items()}
        self._rounds: dict[int, _Round] = {}
        self._next = 0

    async def collect(self, step: int) -> list[Group]:
        """The groups of round `step`, all of whose episodes have ended or been given up.

        Raises PoolError when the round's deadline passes (naming what is missing) or too many episodes were lost.
        """
        self._admit(step)
        wanted = [self._rounds[step]]
        if self._lockstep:
            wanted = [self._rounds[number] for number in sorted(self._rounds)]
        for round in wanted:
            await self._finish(round)
        groups = self._rounds.pop(step).groups(self.config.group_size)
        self._judge_losses(groups)
        return groups

    async def publish(self, weights: Any, version: int) -> None:
        """Hand new weights to the engines; the policy then is at `version`, and later rounds may start."""
        if self._deliver is not None:
            await self._deliver(weights, version)
        self.version = version
        if not self._lockstep:
            self._admit(self._next - 1)

    async def close(self) -> None:
        """Cancel what is under way and wait until it has ended."""
        running = [task for round in self._rounds.values() for task in round.running.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for round in self._rounds.values():
            round.running.clear()

    def state(self) -> dict[str, Any]:
        """Cursors, and the rounds under way with the episodes that have ended; what still runs is played again."""
        rounds = [replace(round, running={}, done=dict(round.done)) for round in self._rounds.values()]
        cursors = {name: tasks.state() for name, tasks in self._tasks.items()}
        counts = {"outcomes": dict(self.outcomes), "retried": dict(self.retried)}
        return {"version": self.version, "next": self._next, "rounds": rounds, "cursors": cursors, **counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; unfinished episodes start with the next `collect`."""
        self.version, self._next = state["version"], state["next"]
        self._rounds = {round.number: round for round in state["rounds"]}
        self.outcomes, self.retried = Counter(state["outcomes"]), Counter(state["retried"])
        for name, cursor in state["cursors"].items():
            self._tasks[name].load_state(cursor)

    def _admit(self, step: int) -> None:
        """Start the rounds that the staleness bound allows; `step` itself must be one of them."""
        if step > self.version + self.config.staleness:
            raise PoolError(f"step {step} needs a policy of version {step - self.config.staleness}, not {self.version}")
        while self._next <= max(step, self.version + self.config.staleness):
            tasks = [task for name, n in self._shares.items() for task in self._tasks[name].take(n)]
            self._rounds[self._next] = _Round(self._next, tasks)
            self._next += 1
        for round in self._rounds.values():
            self._start(round)

    def _start(self, round: _Round) -> None:
        places = [(index, sample) for index in range(len(round.tasks)) for sample in range(self.config.group_size)]
        for place in sorted(places, key=lambda place: (round.tasks[place[0]].key, place[1])):
            if place not in round.done and place not in round.running:
                round.running[place] = asyncio.create_task(self._play(round, *place))

    async def _play(self, round: _Round, index: int, sample: int) -> None:
        task = round.tasks[index]
        twins = sum((o.environment, o.key) == (task.environment, task.key) for o in round.tasks[:index])
        number = sample + twins * self.config.group_size  # a task drawn twice has further samples, not the same again
        episode = await played(self._player, self._draw, round.number, task, number, self.retried)
        self.outcomes[task.environment, episode.outcome.cause.value] += 1
        round.done[index, sample] = episode
        del round.running[index, sample]

    async def _finish(self, round: _Round) -> None:
        if not round.running:
            return
        running = list(round.running.values())
        await asyncio.wait(running, timeout=self.config.round_seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in running:
            if task.done() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        if round.running:
            missing = Counter(round.tasks[index].environment for index, _ in round.running)
            text = ", ".join(f"{n} of {name}" for name, n in sorted(missing.items()))
            raise PoolError(
                f"round {round.number}: still waiting for {text} after {self.config.round_seconds:g} s "
                "(pool.round_seconds)"
            )

    def _judge_losses(self, groups: list[Group]) -> None:
        """Stop a run whose environments are broken, and one that loses most of its episodes."""
        episodes = [episode for group in groups for episode in group.episodes]
        lost = [episode for episode in episodes if isinstance(episode.result, Unscored)]
        if len(lost) > self.config.lost_share * len(episodes):
            first = lost[0].outcome.detail
            raise PoolError(f"{len(lost)} of {len(episodes)} episodes of one step have no score; the first: {first}")
        total = sum(self.outcomes.values())
        errors = Counter({key: n for key, n in self.outcomes.items() if key[1] == Cause.ENVIRONMENT.value})
        if total >= STOP_AFTER and errors.total() > self.config.error_share * total:
            (name, _), count = errors.most_common(1)[0]
            detail = next((e.outcome.detail for e in lost if e.outcome.cause is Cause.ENVIRONMENT), "see the episodes")
            raise PoolError(f"environment {name} failed in {count} of {total} episodes (pool.error_share): {detail}")
