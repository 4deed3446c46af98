"""Small parts that the mixers share: RMSNorm, and linear layers whose weights may be seen through NVFP4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu2(x: Tensor) -> Tensor:
    """relu(x) squared."""
    return F.relu(x).square()


def stays_float32(name: str, tensor: Tensor) -> bool:
    """Whether what has that name on disk is float32 whatever the matrices are: vectors, the router."""
    return tensor.dim() < 2 or ".gate." in name


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """float[..., width] -> the same, in its dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A bias-free linear layer. `seen`, where set, is what the forward pass uses for the weight."""

    seen: Tensor | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """float[..., in] -> float[..., out]."""
        return F.linear(input, self.weight if self.seen is None else self.seen)


class MLP(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., width] -> float[..., width]."""
        result: Tensor = self.down_proj(relu2(self.up_proj(x)))
        return result
