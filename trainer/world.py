"""The seam for rank and world size: counts, gradients and measurements are summed over the ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class World(Protocol):
    """Who else takes part in a step."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """float32[n] of every rank, in rank order, as one vector."""
        ...


class Solo:
    """One process."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value


class Distributed:
    """The ranks of an initialised torch.distributed process group."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce."""
        torch.distributed.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """All-gather of vectors whose lengths may differ."""
        parts: list[Tensor | None] = [None] * self.size
        torch.distributed.all_gather_object(parts, value)
        return torch.cat([part for part in parts if part is not None])
