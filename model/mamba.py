"""The Mamba-2 mixer (arXiv 2405.21060): a chunked scan for sequences, a recurrent step for decoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palaestra.model.cache import State
from palaestra.model.config import ModelConfig
from palaestra.model.layers import Linear, RMSNorm


def step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """One token of the recurrence: state = exp(dt A) state + dt x B, in place; y = state C.

    x float[B, H, P]; dt float[B, H]; a float[H] (negative); b, c float[B, G, N]; state float[B, H, P, N].
    Returns y float[B, H, P].
    """
    state.mul_(torch.exp(dt * a)[..., None, None])
    grouped = state.unflatten(1, (b.shape[1], -1)).flatten(2, 3)
    grouped.addcmul_((dt[..., None] * x).view(grouped.shape[:-1])[..., None], b[:, :, None])
    y: Tensor = (grouped @ c[..., None]).view_as(x)
    return y


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The recurrence of `step` over a sequence, `chunk` tokens at a time by matrix products.

    x float[B, L, H, P]; dt float[B, L, H], 0 where a token must change no state; a float[H]; b, c float[B, L, G, N];
    state float[B, H, P, N]. Returns y float[B, L, H, P] and the last state.
    """
    groups = b.shape[2]
    x, dt, b, c = x.transpose(1, 2), dt.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2)
    outputs = []
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        y, state = _chunk(x[:, :, part], dt[:, :, part], a, b[:, :, part], c[:, :, part], state, groups)
        outputs.append(y)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _chunk(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """One chunk, head-major: x [B, H, l, P], dt [B, H, l], b and c [B, G, l, N], state [B, H, P, N]."""
    length, heads = x.shape[2], x.shape[1] // groups
    decay = (dt * a[:, None]).cumsum(-1)
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    within = torch.exp((decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -math.inf))
    scores = (c @ b.transpose(-1, -2)).repeat_interleave(heads, 1)
    b, c = b.repeat_interleave(heads, 1), c.repeat_interleave(heads, 1)
    weighted = x * dt[..., None]
    y = (scores * within) @ weighted + torch.exp(decay)[..., None] * (c @ state.transpose(-1, -2))
    left = torch.exp(decay[..., -1:] - decay)
    state = state * torch.exp(decay[..., -1])[..., None, None] + (weighted * left[..., None]).transpose(-1, -2) @ b
    return y, state


class GatedRMSNorm(RMSNorm):
    """RMSNorm over each of `groups` equal parts of y * silu(z)."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """float[..., width], gate float[..., width] -> float[..., width]."""
        parts = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight


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
        """float[B, L, hidden] -> the same. Tokens from lengths int64[B] on are padding and change no state; `state`
        (convolution window, recurrent state) is the past, updated in place."""
        config = self.config
        z, xbc, dt = self.in_proj(u).split([config.mamba_width, config.conv_width, config.mamba_num_heads], dim=-1)
        xbc = F.silu(self._convolve(xbc, lengths, state))
        x, b, c = xbc.split([config.mamba_width, *[config.n_groups * config.ssm_state_size] * 2], dim=-1)
        x = x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        b, c = (part.unflatten(-1, (config.n_groups, config.ssm_state_size)) for part in (b, c))
        y = self._recur(x, self._time_step(dt, lengths), b, c, state) + self.D[:, None] * x
        result: Tensor = self.out_proj(self.norm.gated(y.flatten(-2), z))
        return result

    def _time_step(self, dt: Tensor, lengths: Tensor | None) -> Tensor:
        dt = F.softplus(dt + self.dt_bias)
        if self.config.hf_dt_clamp:
            dt = dt.clamp(min=self.config.time_step_min)
        if lengths is not None:
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
        return dt

    def _convolve(self, xbc: Tensor, lengths: Tensor | None, state: State | None) -> Tensor:
        """Depthwise causal convolution over float[B, L, C]; the window of past inputs moves on by each row's length."""
        past = self.config.conv_kernel - 1
        inputs = F.pad(xbc, (0, 0, past, 0)) if state is None else torch.cat([state[0], xbc], dim=1)
        if state is not None:
            ends = xbc.shape[1] if lengths is None else lengths[:, None]
            at = (torch.arange(past, device=xbc.device) + ends).expand(len(xbc), past)
            state[0].copy_(inputs.gather(1, at[..., None].expand(*at.shape, xbc.shape[2])))
        if xbc.shape[1] == 1:
            window = (inputs * self.conv1d.weight[:, 0].T).sum(1)
            return (window if self.conv1d.bias is None else window + self.conv1d.bias)[:, None]
        result: Tensor = self.conv1d(inputs.transpose(1, 2)).transpose(1, 2)
        return result

    def _recur(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: State | None) -> Tensor:
        a = -torch.exp(self.A_log)
        if state is not None and x.shape[1] == 1:
            return step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state[1])[:, None]
        first = state[1] if state is not None else x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1])
        y, last = scan(x, dt, a, b, c, first, self.config.chunk_size)
        if state is not None:
            state[1].copy_(last)
        return y


def _time_steps(config: ModelConfig) -> Tensor:
    """Initial time steps, log-uniform between time_step_min and time_step_max."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    return torch.exp(torch.rand(config.mamba_num_heads) * (high - low) + low).clamp(min=config.time_step_floor)


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
