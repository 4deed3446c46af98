"""Evaluation: policies x environments, k attempts at each task, judged, kept as they finish, and summed up.

A line of `episodes.jsonl` is one finished episode. The same plan run again plays only what is missing, and refuses if
an environment, a task, a policy or the sampling is no longer what the lines were made with.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pydantic import Field, ValidationError

from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment
from palaestra.gym.episode import Bounds, run_episode
from palaestra.gym.files import cannot_write
from palaestra.gym.outcome import RULES
from palaestra.gym.policies import bound
from palaestra.gym.policy import Policy
from palaestra.gym.prototypes import Prototypes
from palaestra.gym.registry import EnvironmentSpec, UsageError
from palaestra.gym.types import SCHEMA_VERSION, Episode, Record, Sampling, Task
from palaestra.gym.wire import flat, task_sha256

EPISODES = "episodes.jsonl"
BOOTSTRAP = 2000
Z95 = 1.959964
Key = tuple[str, str, str, int]


class Plan(Record):
    """What is evaluated: `tasks` tasks of `split` in the order of `seed`, `attempts` times each. An attempt is right
    when its result is at least `right`; `concurrency` episodes run at once."""

    tasks: int = Field(default=100, ge=1)
    attempts: int = Field(default=1, ge=1)
    split: str = "held-out"
    seed: int = 0
    concurrency: int = Field(default=16, ge=1)
    right: float = 1.0
    sampling: Sampling = Sampling()
    bounds: Bounds = Bounds()


class Row(Record):
    """One finished episode. `reward` is None where it is unscored; `seconds` is wall time; the hashes say of what."""

    policy: str
    environment: str
    key: str
    attempt: int
    difficulty: int
    reward: float | None
    rewards: dict[str, float | None]
    metrics: dict[str, float]
    outcome: str
    detail: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    messages: list[dict[str, Any]]
    made_with: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def id(self) -> Key:
        """What a plan asks for once."""
        return self.policy, self.environment, self.key, self.attempt


@dataclass(frozen=True)
class Contest:
    """Who plays what: policies and environments by name, and the policies of further roles."""

    policies: Mapping[str, Policy]
    environments: Sequence[EnvironmentSpec]
    plan: Plan = field(default_factory=Plan)
    roles: Mapping[str, Policy] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    policy: str
    spec: EnvironmentSpec
    task: Task
    attempt: int
    made_with: Mapping[str, str]

    @property
    def id(self) -> Key:
        return self.policy, self.spec.alias, self.task.key, self.attempt


async def evaluate(
    contest: Contest, folder: Path, on_row: Callable[[int, int, Row | None], None] = lambda done, total, row: None
) -> list[Row]:
    """Play what is missing in `folder`, and return the rows of the whole plan.

    `on_row(done, total, row)` is called once at the start (row None) and after each episode. Raises UsageError where
    the folder's rows were made with something else, or two environments share a name.
    """
    jobs = _jobs(contest)
    kept = {row.id: row for row in _resume(folder / EPISODES, jobs)}
    todo = [job for job in jobs if job.id not in kept]
    on_row(len(kept), len(jobs), None)
    if todo:
        await _play_all(contest, todo, folder / EPISODES, kept, lambda row: on_row(len(kept), len(jobs), row))
    return [kept[job.id] for job in jobs]


async def _play_all(
    contest: Contest, todo: Sequence[_Job], path: Path, kept: dict[Key, Row], on_row: Callable[[Row], None]
) -> None:
    slots = asyncio.Semaphore(contest.plan.concurrency)
    specs = {job.spec.alias: job.spec for job in todo}
    prototypes = Prototypes(specs)
    try:
        for alias in specs:
            await prototypes.of(alias)  # what cannot be opened is said before anything is played
        with _appending(path) as lines:

            async def play(job: _Job) -> None:
                async with slots:
                    row = await _attempt(contest, job, await prototypes.of(job.spec.alias))
                try:
                    lines.write(row.model_dump_json() + "\n")
                    lines.flush()
                except OSError as error:
                    raise cannot_write(path, error) from error
                kept[row.id] = row
                on_row(row)

            async with asyncio.TaskGroup() as group:
                for job in todo:
                    group.create_task(play(job))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from group_error
    finally:
        await prototypes.close()


@contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    """The file, open for appending. What a full disk refused is refused again on closing: that is not news."""
    try:
        lines = path.open("a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield lines
    finally:
        with suppress(OSError):
            lines.close()


async def _attempt(contest: Contest, job: _Job, prototype: Environment) -> Row:
    """One episode, tried again as the outcome table says."""
    seed = int(_digest([contest.plan.seed, job.spec.alias, job.task.key, job.attempt])[:7], 16)
    sampling = contest.plan.sampling.model_copy(update={"seed": seed})
    tries = 0
    while True:
        environment = prototype.fresh()
        policy = bound(contest.policies[job.policy], environment, job.task)
        name = _digest(["eval", contest.plan.seed, *job.id, tries])[:24]
        policies = {**contest.roles, "main": policy}
        episode = await run_episode(environment, Loop(), policies, job.task, sampling, name, contest.plan.bounds)
        tries += 1
        if tries > RULES[episode.outcome.cause].retries:
            return _row(job, episode)


def _row(job: _Job, episode: Episode) -> Row:
    return Row(policy=job.policy, attempt=job.attempt, made_with=dict(job.made_with), **flat(episode))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _jobs(contest: Contest) -> list[_Job]:
    aliases = [spec.alias for spec in contest.environments]
    twice = {alias for alias in aliases if aliases.count(alias) > 1}
    if twice:
        raise UsageError(f"two environments are named {', '.join(twice)}; name one: --env OTHER=REF")
    plan = contest.plan
    sampling = _digest([plan.sampling.model_dump_json(), plan.seed, plan.split, plan.bounds.model_dump_json()])
    jobs: list[_Job] = []
    for spec in contest.environments:
        tasks = list(islice(spec.tasks(plan.split, plan.seed), plan.tasks))
        for name, policy in contest.policies.items():
            fixed = {
                "environment": spec.fingerprint(),
                "sampling": sampling,
                "policy": str(getattr(policy, "sha256", "")),
            }
            for task in tasks:
                made_with = {**fixed, "task": task_sha256(task)}
                jobs += [_Job(name, spec, task, attempt, made_with) for attempt in range(plan.attempts)]
    return jobs


def _resume(path: Path, jobs: Iterable[_Job]) -> list[Row]:
    """The rows already there that the plan asks for. Unscored ones are played again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    wanted = {job.id: job for job in jobs}
    rows = [row for row in read(path) if row.id in wanted]
    for row in rows:
        now = wanted[row.id].made_with
        drifted = [name for name, digest in now.items() if row.made_with.get(name) != digest]
        if drifted:
            raise UsageError(
                f"{path}: task {row.key} of {row.environment} was played with another {', '.join(drifted)}; "
                "evaluate into another folder (--out)"
            )
    return [row for row in rows if row.reward is not None]


def read(path: Path) -> list[Row]:
    """The rows of a results file. A last line cut by a kill is removed; any other bad line raises UsageError."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    if rest:
        os.truncate(path, len(content) - len(rest))
    rows: list[Row] = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError:
            raise UsageError(f"{path}, line {number}: not a row of an evaluation; remove the file") from None
    return rows


class Interval(Record):
    """A mean over tasks, with its 95 % interval."""

    mean: float
    low: float
    high: float


class Summary(Record):
    """One policy on one environment. `k` is the number of attempts behind pass_at_k (any right) and pass_hat_k (all
    right); calls, errors, turns, tokens and seconds are means by episode; unscored episodes count in nothing else."""

    policy: str
    environment: str
    tasks: int
    episodes: int
    unscored: int
    k: int
    reward: Interval | None
    pass_at_k: Interval | None
    pass_hat_k: Interval | None
    tool_calls: float
    tool_errors: float
    turns: float
    prompt_tokens: float
    completion_tokens: float
    seconds: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k attempts is right, unbiased from c right ones of n >= k.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """The chance that all of k attempts are right, unbiased from c right ones of n >= k.

    Source: Yao et al. 2024, tau-bench, section 4.
    """
    return math.comb(c, k) / math.comb(n, k)


def interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The mean of one value a task, with a 95 % interval; None without values.

    Wilson's (1927) where each value is 0 or 1, else the percentiles of a bootstrap over tasks.
    """
    if not values:
        return None
    sample = np.asarray(values, dtype=np.float64)
    mean, n = float(sample.mean()), len(sample)
    if set(sample.tolist()) <= {0.0, 1.0}:
        centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
        return Interval(mean=mean, low=max(0.0, centre - half), high=min(1.0, centre + half))
    draws = np.random.default_rng(seed).choice(sample, size=(BOOTSTRAP, n)).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(mean=mean, low=float(low), high=float(high))


def summarise(rows: Iterable[Row], plan: Plan) -> list[Summary]:
    """One summary for each policy and environment, in the order of the rows."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.policy, row.environment), []).append(row)
    return [_summary(cell, plan) for cell in cells.values()]


def _summary(rows: Sequence[Row], plan: Plan) -> Summary:
    by_task: dict[str, list[float]] = {}
    for row in rows:
        if row.reward is not None:
            by_task.setdefault(row.key, []).append(row.reward)
    k = plan.attempts
    counts = [(len(task), sum(r >= plan.right - 1e-9 for r in task)) for task in by_task.values() if len(task) >= k]
    scored = [row for row in rows if row.reward is not None]

    def mean(values: Iterable[float]) -> float:
        listed = list(values)
        return sum(listed) / len(listed) if listed else 0.0

    return Summary(
        policy=rows[0].policy,
        environment=rows[0].environment,
        tasks=len({row.key for row in rows}),
        episodes=len(rows),
        unscored=len(rows) - len(scored),
        k=k,
        reward=interval([mean(task) for task in by_task.values()]),
        pass_at_k=interval([pass_at_k(n, c, k) for n, c in counts]),
        pass_hat_k=interval([pass_hat_k(n, c, k) for n, c in counts]),
        tool_calls=mean(row.metrics.get("tool_calls", 0.0) for row in scored),
        tool_errors=mean(row.metrics.get("tool_errors", 0.0) for row in scored),
        turns=mean(row.metrics.get("turns", 0.0) for row in scored),
        prompt_tokens=mean(row.prompt_tokens for row in scored),
        completion_tokens=mean(row.completion_tokens for row in scored),
        seconds=mean(row.seconds for row in scored),
    )
