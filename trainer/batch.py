"""From episodes to token sequences, and from those to right-padded micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palaestra.gym.agent import MAIN
from palaestra.gym.types import Episode, Group, Turn
from palaestra.trainer.advantages import Returns, trained

BUCKET = 16
"""Padded lengths are multiples of this: few distinct shapes, little padding."""


class Refused(ValueError):
    """What training cannot learn from, and why."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sequence: a path from the root to a leaf.

    ids int32[n]; mu float32[n], the sampler's log-probability (0 where not `loss`); loss bool[n], the tokens that carry
    loss (never the first); advantage of the episode.
    """

    ids: NDArray[np.int32]
    mu: NDArray[np.float32]
    loss: NDArray[np.bool_]
    advantage: float = 1.0

    def __post_init__(self) -> None:
        if len(self.loss) and self.loss[0]:
            raise Refused("the first token of a sequence carries loss, but nothing precedes it to predict it from")


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step learns from. `versions`: sampled tokens by the policy version that drew them."""

    sequences: Sequence[Sample]
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that carry loss."""
        return int(sum(sequence.loss.sum() for sequence in self.sequences))


@dataclass(frozen=True, eq=False)
class Micro:
    """A right-padded micro-batch: ids int64[B, L], lengths int64[B], loss bool[B, L], mu float32[B, L],
    advantage float32[B]; `rows` are the sequences' places in the batch."""

    ids: Tensor
    lengths: Tensor
    loss: Tensor
    mu: Tensor
    advantage: Tensor
    rows: tuple[int, ...]


def pack(groups: Iterable[Group], advantages: Returns) -> Batch:
    """The training sequences of all trained episodes, in order. Raises Refused for turns without token ids."""
    sequences: list[Sample] = []
    versions: dict[int, int] = {}
    for group, values in zip(groups, advantages, strict=True):
        for episode, value in zip(group.episodes, values, strict=True):
            if trained(episode):
                sequences += paths(episode, float(value))
                _count_versions(episode, versions)
    return Batch(sequences, versions)


def paths(episode: Episode, advantage: float) -> list[Sample]:
    """A sequence for each leaf of the episode's tree of turns; a token that several paths share carries loss once."""
    seen: set[int] = set()
    sequences = []
    for leaf in episode.leaves():
        path = _indices(episode, leaf)
        turns = [episode.turns[index] for index in path]
        if _tokenless(episode, turns):
            continue
        sequences.append(_sequence(turns, [index not in seen for index in path], advantage))
        seen.update(path)
    return [sequence for sequence in sequences if sequence.loss.any()]


def _indices(episode: Episode, leaf: int) -> list[int]:
    path: list[int] = []
    at: int | None = leaf
    while at is not None:
        path.append(at)
        at = episode.turns[at].parent
    return path[::-1]


def _tokenless(episode: Episode, turns: Sequence[Turn]) -> bool:
    """Whether a path belongs to another role's chat policy. The trained policy itself must speak in tokens."""
    bare = [turn for turn in turns if turn.completion.generation is None or turn.completion.prompt_ids is None]
    if any(turn.agent == MAIN for turn in bare):
        raise Refused(
            f"episode {episode.id}: the policy's turns have no token ids (a chat policy); RLVR needs a token policy "
            "such as model:PATH, and supervised training takes conversations"
        )
    return bool(bare)


def _sequence(turns: Sequence[Turn], fresh: Sequence[bool], advantage: float) -> Sample:
    ids, mu, loss = [], [], []
    for turn, new in zip(turns, fresh, strict=True):
        prompt, drawn = turn.completion.prompt_ids, turn.completion.generation
        assert prompt is not None
        assert drawn is not None
        ids += [prompt, drawn.ids]
        mu += [np.zeros(len(prompt), np.float32), drawn.logprobs]
        loss += [np.zeros(len(prompt), bool), drawn.sampled & new]
    flags = np.concatenate(loss)
    return Sample(np.concatenate(ids), np.where(flags, np.concatenate(mu), np.float32(0)), flags, advantage)


def _count_versions(episode: Episode, versions: dict[int, int]) -> None:
    for turn in episode.turns:
        if turn.completion.generation is not None:
            for version, count in turn.completion.generation.versions:
                versions[version] = versions.get(version, 0) + count


def micro_batches(sequences: Sequence[Sample], rows: Sequence[int], budget: int) -> Iterator[Micro]:
    """Split the sequences named by `rows` into micro-batches of at most `budget` padded tokens, alike lengths together.

    A sequence longer than the budget gets a micro-batch of its own.
    """
    chosen: list[int] = []
    for row in sorted(rows, key=lambda row: (_padded(sequences[row]), row)):
        if chosen and (len(chosen) + 1) * _padded(sequences[row]) > budget:
            yield _micro(sequences, chosen)
            chosen = []
        chosen.append(row)
    if chosen:
        yield _micro(sequences, chosen)


def _padded(sequence: Sample) -> int:
    return -(-len(sequence.ids) // BUCKET) * BUCKET


def _micro(sequences: Sequence[Sample], rows: Sequence[int]) -> Micro:
    length = max(_padded(sequences[row]) for row in rows)
    ids = np.zeros((len(rows), length), np.int64)
    mu = np.zeros((len(rows), length), np.float32)
    loss = np.zeros((len(rows), length), bool)
    for place, row in enumerate(rows):
        sequence = sequences[row]
        n = len(sequence.ids)
        ids[place, :n], mu[place, :n], loss[place, :n] = sequence.ids, sequence.mu, sequence.loss
    return Micro(
        ids=torch.from_numpy(ids),
        lengths=torch.tensor([len(sequences[row].ids) for row in rows]),
        loss=torch.from_numpy(loss),
        mu=torch.from_numpy(mu),
        advantage=torch.tensor([sequences[row].advantage for row in rows], dtype=torch.float32),
        rows=tuple(rows),
    )
