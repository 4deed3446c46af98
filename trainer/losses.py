"""Losses: pure functions of token tensors to a sum and its measurements.

Every tensor is float32[n], one entry a token that carries loss. A loss returns the sum over those tokens: the caller
divides by the global count, so that results change with neither micro-batch, packing nor world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Sums = dict[str, Tensor]


class Tokens(NamedTuple):
    """What a loss sees: `lp` with gradient; `old`, the trainer's before the first minibatch; `mu`, the sampler's;
    the advantage of each token's episode."""

    lp: Tensor
    old: Tensor
    mu: Tensor
    advantage: Tensor


class LossConfig(BaseModel):
    """The clipped ratio and the clipped importance weight of the RLVR loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.28, ge=0)
    importance_cap: float = Field(default=5.0, gt=0)


def rlvr(tokens: Tokens, config: LossConfig) -> tuple[Tensor, Sums]:
    """-sum w min(r A, clip(r, 0.8, 1.28) A), r = exp(lp - old), w = min(exp(old - mu), 5) detached.

    Nemotron 3 Super's RLVR stage: no KL term; `w` corrects for the sampler's numbers being slightly others.
    """
    ratio = torch.exp(tokens.lp - tokens.old)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    weight = torch.exp(tokens.old - tokens.mu).detach()
    gain = torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
    loss = -(weight.clamp(max=config.importance_cap) * gain).sum()
    return loss, {
        "importance_clipped": (weight > config.importance_cap).sum(),
        "ratio_clipped": (ratio.detach() != clipped.detach()).sum(),
        "mismatch_kl": (weight - 1 - (tokens.old - tokens.mu).detach()).sum(),
    }


def sft(tokens: Tokens, config: LossConfig) -> tuple[Tensor, Sums]:
    """-sum lp: cross entropy."""
    return -tokens.lp.sum(), {}


LOSSES: dict[str, Callable[[Tokens, LossConfig], tuple[Tensor, Sums]]] = {"rlvr": rlvr, "sft": sft}
