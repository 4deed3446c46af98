"""Continuing one sequence of ids, for a look at a model; engines (rollout/) do it for many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.decoder import Decoder


def continued(
    decoder: Decoder, config: ModelConfig, ids: Sequence[int], count: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Up to `count` ids that follow `ids` (at least one), as they are drawn: the likeliest at temperature 0."""
    cache, row = Cache.empty(config, 1, len(ids) + count), torch.zeros(1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    if len(ids) > 1:
        decoder.prefill([ids[:-1]], [0], cache)
    last = ids[-1]
    for _ in range(count):
        logits = decoder.step(torch.tensor([last]), row, cache)[0]
        if temperature:
            last = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            last = int(logits.argmax())
        yield last
