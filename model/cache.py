"""What a conversation leaves behind in the network: attention keys and values, Mamba states."""

from __future__ import annotations

import torch
from torch import Tensor

from palaestra.model.config import ModelConfig

State = tuple[Tensor, Tensor]


class Cache:
    """State of `batch` conversations, a row each.

    lengths: int64[batch], tokens seen; per layer, by index: for `*` keys and values float32[batch, KV heads, capacity,
    head_dim]; for `M` the last conv_kernel - 1 convolution inputs float32[batch, conv_kernel - 1, conv_width] and the
    state float32[batch, heads, head_dim, state].
    """

    def __init__(self, lengths: Tensor, layers: dict[int, State], attention: frozenset[int], capacity: int) -> None:
        self.lengths = lengths
        self.layers = layers
        self.attention = attention
        self.capacity = capacity

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, device: torch.device | str = "cpu") -> Cache:
        """A cache of fresh rows, for at most `capacity` tokens each."""
        layers: dict[int, State] = {}
        for index, letter in enumerate(config.hybrid_override_pattern):
            if letter == "*":
                shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
                layers[index] = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
            elif letter == "M":
                window = (batch, config.conv_kernel - 1, config.conv_width)
                state = (batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                layers[index] = (torch.zeros(window, device=device), torch.zeros(state, device=device))
        attention = frozenset(i for i, letter in enumerate(config.hybrid_override_pattern) if letter == "*")
        return cls(torch.zeros(batch, dtype=torch.int64, device=device), layers, attention, capacity)

    def select(self, rows: Tensor, capacity: int | None = None) -> Cache:
        """A copy of some rows (int64[n]; a row may repeat), with room for `capacity` tokens (None: as many as here)."""
        room = self.capacity if capacity is None else capacity
        layers = {
            index: (first[rows, :, :room], second[rows, :, :room])
            if index in self.attention
            else (first[rows], second[rows])
            for index, (first, second) in self.layers.items()
        }
        return Cache(self.lengths[rows], layers, self.attention, room)

    def write(self, rows: Tensor, other: Cache) -> None:
        """Copy the rows of `other`, which may have less room, over the rows int64[n] of this one."""
        self.lengths[rows] = other.lengths
        for index, (first, second) in self.layers.items():
            if index in self.attention:
                first[rows, :, : other.capacity] = other.layers[index][0]
                second[rows, :, : other.capacity] = other.layers[index][1]
            else:
                first[rows], second[rows] = other.layers[index]

    def clear(self, row: int) -> None:
        """Make a row fresh. Its keys and values stay where they are, unseen."""
        self.lengths[row] = 0
        for index, (first, second) in self.layers.items():
            if index not in self.attention:
                first[row] = 0
                second[row] = 0
