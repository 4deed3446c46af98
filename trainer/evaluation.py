"""Held-out evaluation: the same tasks before and after, at temperature 1 and greedily, compared task by task."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from palaestra.gym.registry import EnvironmentSpec
from palaestra.gym.types import Episode, Sampling, Scored, Task
from palaestra.rollout.pool import Draw, PoolError, played
from palaestra.rollout.worker import Player
from palaestra.trainer.recipe import Recipe

Scores = dict[str, dict[str, dict[str, float]]]
"""Environment -> "mean" (temperature 1) or "greedy" -> task key -> return; tasks without a score are absent."""


class Evaluation(NamedTuple):
    """Held-out scores, the episodes behind them by mode, and how many were played again by cause."""

    scores: Scores
    episodes: dict[str, list[Episode]]
    retried: Counter[str]


MODES = {"mean": 1.0, "greedy": 0.0}
Z95 = 1.959964


def held_out(specs: Mapping[str, EnvironmentSpec], recipe: Recipe) -> dict[str, list[Task]]:
    """The tasks of the evaluation by environment: the first of the held-out split, in the order of its own seed."""
    plan = recipe.evaluation
    return {name: list(islice(spec.tasks("held-out", plan.seed), plan.tasks)) for name, spec in specs.items()}


async def evaluate(
    player: Player,
    tasks: Mapping[str, list[Task]],
    recipe: Recipe,
    seen: Callable[[str, int, int], None] = lambda mode, done, total: None,
) -> Evaluation:
    """Play every task once a mode. Before and after draw with the same seeds. `seen` is told how many of a mode's
    episodes have ended.

    Raises PoolError where more of them than `pool.lost_share` have no score.
    """
    found = Evaluation({name: {} for name in tasks}, {}, Counter())
    flat = [task for part in tasks.values() for task in part]
    for mode, temperature in MODES.items():
        sampling = Sampling(temperature=temperature, max_tokens=recipe.rollout.max_tokens)
        draw = Draw(recipe.seed, f"evaluation-{mode}", sampling)
        told = partial(seen, mode)
        episodes = await _play_all(player, flat, draw, recipe.evaluation.concurrency, found.retried, told)
        _judge_losses(episodes, recipe.pool.lost_share)
        found.episodes[mode] = episodes
        for name in tasks:
            found.scores[name][mode] = {
                episode.task.key: episode.result.value
                for episode in episodes
                if episode.task.environment == name and isinstance(episode.result, Scored)
            }
    return found


async def _play_all(
    player: Player,
    tasks: Sequence[Task],
    draw: Draw,
    concurrency: int,
    retried: Counter[str],
    seen: Callable[[int, int], None],
) -> list[Episode]:
    """An episode of each task, in their order. Where one raises, the others are cancelled first."""
    gate = asyncio.Semaphore(concurrency)
    ended = itertools.count(1)

    async def play(task: Task) -> Episode:
        async with gate:
            episode = await played(player, draw, 0, task, 0, retried)
        seen(next(ended), len(tasks))
        return episode

    running = [asyncio.create_task(play(task)) for task in tasks]
    try:
        return await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _judge_losses(episodes: list[Episode], share: float) -> None:
    lost = [episode for episode in episodes if not isinstance(episode.result, Scored)]
    if len(lost) > share * len(episodes):
        first = lost[0].outcome.detail
        raise PoolError(f"{len(lost)} of {len(episodes)} episodes of the evaluation have no score; the first: {first}")


def summary(before: Scores, after: Scores, tasks: Mapping[str, Iterable[Task]]) -> dict[str, Any]:
    """What summary.json holds: means, and paired gains with 95 % intervals; gains by level beside them."""
    environments: dict[str, dict[str, Any]] = {}
    levels: dict[str, Any] = {}
    for name, found in tasks.items():
        found = list(found)
        environments[name] = {
            "tasks": len(found),
            "before": {mode: _mean(before[name][mode].values()) for mode in MODES},
            "after": {mode: _mean(after[name][mode].values()) for mode in MODES},
            "gain": paired(before[name]["mean"], after[name]["mean"]),
            "greedy_gain": paired(before[name]["greedy"], after[name]["greedy"]),
        }
        levels[name] = {
            str(level): paired(
                before[name]["mean"], after[name]["mean"], {t.key for t in found if t.difficulty == level}
            )
            for level in sorted({task.difficulty for task in found})
        }
    gains = [part["gain"]["mean"] for part in environments.values()]
    unscored = {when: _unscored(scores, environments) for when, scores in (("before", before), ("after", after))}
    measured = {"mean_gain": _mean(gains), "unscored": unscored}
    return {"schema_version": 1, "environments": environments, "levels": levels, **measured}


def _unscored(scores: Scores, environments: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many episodes of each environment have no score, over both modes."""
    return {name: sum(part["tasks"] - len(scores[name][mode]) for mode in MODES) for name, part in environments.items()}


def paired(before: Mapping[str, float], after: Mapping[str, float], keys: set[str] | None = None) -> dict[str, float]:
    """Mean difference and its 95 % interval (normal) over the tasks that both have scored; of 0 tasks where there are
    fewer than two, which have no interval."""
    common = [key for key in before if key in after and (keys is None or key in keys)]
    differences = np.array([after[key] - before[key] for key in common])
    if len(differences) < 2:
        return {"mean": 0.0, "low": 0.0, "high": 0.0, "tasks": 0}
    mean = float(differences.mean())
    half = Z95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - half, "high": mean + half, "tasks": len(differences)}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
