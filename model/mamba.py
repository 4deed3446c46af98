"""The Mamba-2 mixer (arXiv 2405.21060): a scan for sequences, a recurrent step for decoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palaestra.kernels.mamba import convolve, gated_norm, recur, scan
from palaestra.model.cache import State
from palaestra.model.config import ModelConfig
from palaestra.model.layers import Linear, RMSNorm


class GatedRMSNorm(RMSNorm):
    """RMSNorm over each of `groups` equal parts of y * silu(z)."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """float[..., width], gate float[..., width] -> float[..., width]."""
        return gated_norm(y, z, self.weight, self.groups, self.eps)


class Mamba(nn.Module):
    """in_proj -> [z | xBC | dt]; causal conv and silu over xBC; the recurrence; + D x; gated norm; out_proj."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, conv = config.mamba_num_heads, config.mamba_width, config.conv_width
        self.in_proj = Linear(config.hidden_size, width + conv + heads)
        self.conv1d = nn.Conv1d(conv, conv, config.conv_kernel, groups=conv)
        self.dt_bias = nn.Parameter(_inverse_softplus(_time_steps(config)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(width, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = Linear(width, config.hidden_size)

    def forward(self, u: Tensor, lengths: Tensor | None, state: State | None) -> Tensor:
        """float[B, L, hidden] -> the same; float32 between the projections. Tokens from lengths int64[B] on are padding
        and change no state; `state` (convolution window, recurrent state) is the past, updated in place."""
        config = self.config
        z, xbc, dt = (
            self.in_proj(u).float().split([config.mamba_width, config.conv_width, config.mamba_num_heads], dim=-1)
        )
        xbc = self._convolve(xbc, lengths, state)
        x, b, c = xbc.split([config.mamba_width, *[config.n_groups * config.ssm_state_size] * 2], dim=-1)
        x = x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        b, c = (part.unflatten(-1, (config.n_groups, config.ssm_state_size)) for part in (b, c))
        y = self._recur(x, self._time_step(dt, lengths), b, c, state)
        result: Tensor = self.out_proj(self.norm.gated(y.flatten(-2), z).to(u.dtype))
        return result

    def _time_step(self, dt: Tensor, lengths: Tensor | None) -> Tensor:
        dt = F.softplus(dt + self.dt_bias)
        if self.config.hf_dt_clamp:
            dt = dt.clamp(min=self.config.time_step_min)
        if lengths is not None:
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
        return dt

    def _convolve(self, xbc: Tensor, lengths: Tensor | None, state: State | None) -> Tensor:
        """silu(depthwise causal convolution) over float[B, L, C]; the window of past inputs moves on by each row's
        length."""
        weight, bias, past = self.conv1d.weight[:, 0].float(), self.conv1d.bias, self.config.conv_kernel - 1
        assert bias is not None
        if state is None:
            return convolve(xbc, weight, bias)
        inputs = torch.cat([state[0], xbc], dim=1)
        ends = xbc.shape[1] if lengths is None else lengths[:, None]
        at = (torch.arange(past, device=xbc.device) + ends).expand(len(xbc), past)
        state[0].copy_(inputs.gather(1, at[..., None].expand(*at.shape, xbc.shape[2])))
        if xbc.shape[1] == 1:
            return F.silu((inputs * weight.T).sum(1, keepdim=True) + bias)
        return convolve(inputs, weight, bias)[:, past:]

    def _recur(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: State | None) -> Tensor:
        a = -torch.exp(self.A_log)
        if state is not None and x.shape[1] == 1:
            return recur(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state[1])[:, None] + self.D[:, None] * x
        first = None if state is None else state[1]
        y, last = scan(x, dt, a, b, c, self.D, first, chunk=self.config.chunk_size)
        if state is not None:
            state[1].copy_(last)
        return y


def _time_steps(config: ModelConfig) -> Tensor:
    """Initial time steps, log-uniform between time_step_min and time_step_max."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    return torch.exp(torch.rand(config.mamba_num_heads) * (high - low) + low).clamp(min=config.time_step_floor)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
