"""Advantages: pure functions from the returns of groups to one number an episode.

A return is NaN where an episode has none (unscored, or not trained on): it gets 0 and counts for nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from palaestra.gym.outcome import RULES
from palaestra.gym.types import Episode, Group, Scored

Returns = list[NDArray[np.float64]]
"""float64[episodes], one array a group."""

CLIP = 50.0
EPSILON = 1e-6


def trained(episode: Episode) -> bool:
    """Whether an episode takes part in training: its outcome says so, and it has a score."""
    return RULES[episode.outcome.cause].trained and isinstance(episode.result, Scored)


def returns(groups: Sequence[Group]) -> Returns:
    """The return of every episode; NaN where it has none."""
    return [np.array([_return(episode) for episode in group.episodes], np.float64) for group in groups]


def _return(episode: Episode) -> float:
    return episode.result.value if isinstance(episode.result, Scored) and trained(episode) else float("nan")


def permuted(values: Returns, environments: Sequence[str], generator: np.random.Generator) -> Returns:
    """The returns shuffled among the scored episodes of each environment: the control of a verifier's signal.

    `environments` names the environment of each group.
    """
    shuffled = [value.copy() for value in values]
    for name in sorted(set(environments)):
        places = [
            (group, index)
            for group, value in enumerate(values)
            if environments[group] == name
            for index in np.flatnonzero(~np.isnan(value))
        ]
        for to, source in zip(places, generator.permutation(len(places)), strict=True):
            group, index = places[source]
            shuffled[to[0]][to[1]] = values[group][index]
    return shuffled


def group_std(values: Returns) -> Returns:
    """A_i = (R_i - mean of the others) / (the group's population standard deviation + 1e-6), clipped to +-50.

    Nemotron 3 Super's RLVR stage. A group with fewer than two scored episodes, or with equal returns, gets 0.
    """
    return [np.clip(_leave_one_out(value) / (_std(value) + EPSILON), -CLIP, CLIP) for value in values]


def batch_rms(values: Returns) -> Returns:
    """The same difference over the root mean square of all non-zero differences of the batch, clipped to +-50."""
    differences = [_leave_one_out(value) for value in values]
    flat = np.concatenate(differences) if differences else np.zeros(0)
    flat = flat[flat != 0]
    scale = float(np.sqrt(np.mean(flat**2))) + EPSILON if len(flat) else 1.0
    return [np.clip(difference / scale, -CLIP, CLIP) for difference in differences]


def _std(value: NDArray[np.float64]) -> float:
    scored = value[~np.isnan(value)]
    return float(scored.std()) if len(scored) else 0.0


def _leave_one_out(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """R_i minus the mean of the group's other scored returns; exactly 0 where there are none or all are equal."""
    scored = ~np.isnan(value)
    n = int(scored.sum())
    result = np.zeros(len(value))
    if n >= 2 and np.ptp(value[scored]) > 0:
        result[scored] = (value[scored] - value[scored].mean()) * n / (n - 1)
    return result


ADVANTAGES: dict[str, Callable[[Returns], Returns]] = {"group_std": group_std, "batch_rms": batch_rms}
