"""Grouped-query attention without position embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palaestra.model.cache import Cache, State
from palaestra.model.config import ModelConfig
from palaestra.model.layers import Linear


class Attention(nn.Module):
    """Causal attention over the row's own past, cached or not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.dim)
        self.o_proj = Linear(self.heads * self.dim, config.hidden_size)

    def forward(self, x: Tensor, state: State | None, cache: Cache | None) -> Tensor:
        """float[B, L, hidden] -> the same; `state` holds the keys and values of `cache`, extended in place."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        if state is None or cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = self._cached(q, k, v, state, cache)
        result: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return result

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, state: State, cache: Cache) -> Tensor:
        """Append k and v at each row's own length, then attend to everything up to each query's position."""
        length = q.shape[2]
        past = cache.lengths
        at = past[:, None] + torch.arange(length, device=q.device)
        total = int(at.max()) + 1
        if total > state[0].shape[2]:
            raise ValueError(f"attention cache holds {state[0].shape[2]} tokens a row; {total} are needed")
        rows = torch.arange(len(past), device=q.device)[:, None]
        for part, fresh in zip(state, (k, v), strict=True):
            part[rows, :, at] = fresh.transpose(1, 2).to(part.dtype)
        keys, values = (part[:, :, :total].to(q.dtype) for part in state)
        mask = torch.arange(total, device=q.device) <= at[:, None, :, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
