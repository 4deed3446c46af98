"""A layer of the network: a norm and a mixer, of the kind that a letter of the pattern names."""

from __future__ import annotations

from torch import Tensor, nn

from palaestra.model.attention import Attention
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.layers import MLP, RMSNorm
from palaestra.model.mamba import Mamba
from palaestra.model.moe import LatentMoE


def _mixer(letter: str, config: ModelConfig) -> nn.Module:
    if letter == "-":
        return MLP(config.hidden_size, config.intermediate_size)
    return {"M": Mamba, "*": Attention, "E": LatentMoE}[letter](config)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, letter: str, config: ModelConfig) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(letter, config)

    def forward(self, x: Tensor, lengths: Tensor | None, cache: Cache | None, index: int) -> Tensor:
        """float[B, L, hidden] -> the same."""
        normed = self.norm(x)
        state = None if cache is None else cache.layers.get(index)
        if self.letter == "M":
            mixed = self.mixer(normed, lengths, state)
        elif self.letter == "*":
            mixed = self.mixer(normed, state, cache)
        else:
            mixed = self.mixer(normed)
        result: Tensor = x + mixed
        return result
