"""Multi-token prediction: a block of layers that looks one token further than its input, at every depth the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palaestra.model.block import Block
from palaestra.model.config import ModelConfig
from palaestra.model.layers import Linear, RMSNorm


class PredictionLayer(Block):
    """A layer of the block; the first one joins its two inputs, the last one ends in a norm."""

    def __init__(self, letter: str, config: ModelConfig, first: bool, last: bool) -> None:
        super().__init__(letter, config)
        if first:
            self.enorm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.hnorm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        if last:
            self.final_layernorm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class Prediction(nn.Module):
    """The block, under the names of published checkpoints: `layers.0.{enorm,hnorm,eh_proj}`, `layers.I.{norm,mixer}`,
    `layers.LAST.final_layernorm`. Embedding and output matrix are the trunk's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pattern = config.mtp_hybrid_override_pattern
        self.layers = nn.ModuleList(
            PredictionLayer(letter, config, at == 0, at == len(pattern) - 1) for at, letter in enumerate(pattern)
        )

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The next depth's hidden states float[B, L, hidden], from which `lm_head` foretells the token after the next.

        hidden float[B, L, hidden]: the trunk's behind its last norm, or those of the depth before; embedded
        float[B, L, hidden]: the tokens after them.
        """
        first: Any = self.layers[0]
        last: Any = self.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], -1))
        for index, layer in enumerate(self.layers):
            x = layer(x, None, None, index)
        result: Tensor = last.final_layernorm(x)
        return result
