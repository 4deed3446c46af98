"""Synthetic text that teaches a small model to copy and to look up: tokens repeated, pairs recalled by their key.

From demonstrations alone a model of one attention layer learns to copy suddenly and late: a copied name is one token in
fifteen there, and one of hundreds. Here every other token is copied, at first from a handful of tokens; once those are
copied, many more soon are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from palaestra.trainer.batch import Sample

SHORTEST, LONGEST = 4, 8
FIRST, WAIT, DOUBLING = 32, 150, 40
"""The number of tokens at first, the steps before there are more, and the steps in which they double."""


class Drills:
    """An endless stream of drills over `tokens` (those of the tasks, less the tags), a function of seed and step."""

    def __init__(self, tokens: Iterable[int], seed: int) -> None:
        self._seed = seed
        self._tokens = np.random.default_rng(seed).permutation(np.array(sorted(set(tokens)), np.int32))

    def batch(self, count: int, step: int) -> list[Sample]:
        """`count` sequences, half of each kind, over as many tokens as `step` allows."""
        generator = np.random.default_rng((self._seed, step))
        known = self._tokens[: int(FIRST * 2 ** min(20.0, max(0.0, (step - WAIT) / DOUBLING)))]
        kinds = (_repeated, _recalled)
        return [kinds[place % 2](known, generator) for place in range(count)]


def _repeated(tokens: NDArray[np.int32], generator: np.random.Generator) -> Sample:
    """Distinct tokens, then the same again: what followed a token follows it."""
    chosen = _distinct(tokens, generator)
    return _sample(chosen, chosen, np.arange(len(chosen)) > 0)


def _recalled(tokens: NDArray[np.int32], generator: np.random.Generator) -> Sample:
    """Pairs (key, value), then the keys in another order, each to be followed by its value."""
    pairs = _distinct(tokens, generator).reshape(-1, 2)
    asked = generator.permutation(pairs)
    return _sample(pairs.flatten(), asked.flatten(), np.tile([False, True], len(pairs)))


def _distinct(tokens: NDArray[np.int32], generator: np.random.Generator) -> NDArray[np.int32]:
    count = 2 * int(generator.integers(SHORTEST, LONGEST))
    return generator.choice(tokens, min(count, len(tokens) // 2 * 2), replace=False)


def _sample(shown: NDArray[np.int32], asked: NDArray[np.int32], loss: NDArray[np.bool_]) -> Sample:
    ids = np.concatenate([shown, asked])
    return Sample(ids, np.zeros(len(ids), np.float32), np.concatenate([np.zeros(len(shown), bool), loss]))
