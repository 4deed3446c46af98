"""Synthetic text that teaches a small model to copy and to look up: tokens repeated, pairs recalled by their key.

A model of one attention layer learns to copy suddenly and late from demonstrations alone, where a copied name is one
token in fifteen; here every other token is one. The tokens are those of the demonstrations beside, in random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from palaestra.trainer.batch import Sample

SHORTEST, LONGEST = 4, 16


def drills(count: int, beside: Sequence[Sample], tags: Sequence[int], generator: np.random.Generator) -> list[Sample]:
    """`count` sequences, half of each kind, of the distinct tokens of the samples `beside`, less the ids in `tags`."""
    tokens = np.setdiff1d(np.concatenate([sample.ids for sample in beside]), np.array(tags))
    kinds = (_repeated, _recalled)
    return [kinds[place % 2](tokens, generator) for place in range(count)]


def _repeated(tokens: NDArray[np.int32], generator: np.random.Generator) -> Sample:
    """Distinct tokens, then the same again: what followed a token follows it."""
    chosen = _distinct(tokens, 2 * int(generator.integers(SHORTEST, LONGEST)), generator)
    again = np.arange(len(chosen)) > 0
    return _sample(chosen, chosen, again)


def _recalled(tokens: NDArray[np.int32], generator: np.random.Generator) -> Sample:
    """Pairs (key, value), then the keys in another order, each to be followed by its value."""
    pairs = _distinct(tokens, 2 * int(generator.integers(SHORTEST, LONGEST)), generator).reshape(-1, 2)
    asked = generator.permutation(pairs)
    return _sample(pairs.flatten(), asked.flatten(), np.tile([False, True], len(pairs)))


def _distinct(tokens: NDArray[np.int32], count: int, generator: np.random.Generator) -> NDArray[np.int32]:
    return generator.choice(tokens, min(count, len(tokens) // 2 * 2), replace=False)


def _sample(shown: NDArray[np.int32], asked: NDArray[np.int32], loss: NDArray[np.bool_]) -> Sample:
    ids = np.concatenate([shown, asked])
    return Sample(ids, np.zeros(len(ids), np.float32), np.concatenate([np.zeros(len(shown), bool), loss]))
