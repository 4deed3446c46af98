"""Mamba-2 (arXiv 2405.21060): the recurrence over sequences, what stands before and after it, and a step of decoding.

Each has a plain version in PyTorch. Where the C was built, float32 tensors on the CPU whose widths are multiples of 16
go through it, with gradients; PALAESTRA_KERNELS=torch, other devices and dtypes take the plain versions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from palaestra.kernels import mamba_native, native
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import TILE, library

STATES = (torch.float32, torch.bfloat16, torch.float16)
"""What recurrent states may be kept in."""
ROUNDED = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
"""Binary digits, and the exponent of the smallest subnormal."""


def recur(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """One token of the recurrence: state = exp(dt A) state + dt x B, in place; y = state C.

    x float[B, H, P]; dt float[B, H]; a float[H] (negative); b, c float[B, G, N]; state float[B, H, P, N].
    Returns y float[B, H, P].
    """
    state.mul_(torch.exp(dt * a)[..., None, None])
    grouped = state.unflatten(1, (b.shape[1], -1)).flatten(2, 3)
    grouped.addcmul_((dt[..., None] * x).view(grouped.shape[:-1])[..., None], b[:, :, None])
    y: Tensor = (grouped @ c[..., None]).view_as(x)
    return y


def scan_plain(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """What `scan` computes, in PyTorch: `chunk` tokens at a time by matrix products."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1]) if state is None else state
    fresh = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if starts is None else starts
    heads_first = [tensor.transpose(1, 2) for tensor in (x * dt[..., None], dt * a, b, c, fresh[..., None])]
    outputs = []
    for start in range(0, x.shape[1], chunk):
        y, state = _chunk([tensor[:, :, start : start + chunk] for tensor in heads_first], state)
        outputs.append(y)
    return torch.cat(outputs, dim=2).transpose(1, 2) + d[:, None] * x, state


def _chunk(parts: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, head-major: dt x [B, H, l, P], logarithms of decays [B, H, l], b, c [B, G, l, N], fresh [B, 1, l]."""
    x, decay, b, c, fresh = parts
    length, heads = x.shape[2], x.shape[1] // b.shape[1]
    number, decay = fresh.cumsum(-1), decay.cumsum(-1)  # tokens see their own sequence's alone
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    unseen = ~causal | (number[..., :, None] != number[..., None, :])
    within = torch.exp((decay[..., :, None] - decay[..., None, :]).masked_fill(unseen, -math.inf))
    scores = (c @ b.transpose(-1, -2)).repeat_interleave(heads, 1)
    b, c = b.repeat_interleave(heads, 1), c.repeat_interleave(heads, 1)
    before = torch.exp(decay.masked_fill(number > 0, -math.inf))
    left = torch.exp((decay[..., -1:] - decay).masked_fill(number < number[..., -1:], -math.inf))
    y = (scores * within) @ x + before[..., None] * (c @ state.transpose(-1, -2))
    state = state * before[..., -1, None, None] + (x * left[..., None]).transpose(-1, -2) @ b
    return y, state


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence over sequences: state = exp(dt A) state + dt x B; y = state C + D x.

    x float[B, L, H, P]; dt float[B, L, H], 0 where a token must change no state (padding); a float[H] (negative);
    b, c float[B, L, G, N]; d float[H]; state float[B, H, P, N], the first (None: zeros); starts bool[B, L] marks tokens
    before which the state becomes zero again, where a row holds several sequences; chunk: of the plain version.
    Returns y float[B, L, H, P] and the last state. All floats have gradients. Raises ValueError for no tokens, and for
    heads that the groups do not divide.
    """
    if not x.shape[1] or x.shape[2] % b.shape[2]:
        raise ValueError(
            f"a token at least, and as many heads for every group; got x {list(x.shape)}, b {list(b.shape)}"
        )
    tensors = [x, dt, a, b, c, d, *([] if state is None else [state])]
    if _native(tensors, x.shape[-1], b.shape[-1]):
        y, last = mamba_native.scan(x, dt, a, b, c, d, state, starts)
        return y, last
    return scan_plain(x, dt, a, b, c, d, state, starts, chunk)


def _native(tensors: list[Tensor], *widths: int) -> bool:
    """Whether the C takes them."""
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return False
    return not any(width % TILE for width in widths) and library() is not None


def convolve(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """silu(causal depthwise convolution): x float[B, L, W], weight float[W, K], bias float[W] -> float[B, L, W].

    A token sees the K - 1 before it, but none before the last one that starts bool[B, L] marks.
    """
    if _native([x, weight, bias], x.shape[-1]):
        result: Tensor = mamba_native.convolve(x, weight, bias, starts)
        return result
    return convolve_plain(x, weight, bias, starts)


def convolve_plain(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """What `convolve` computes, in PyTorch."""
    past = weight.shape[1] - 1
    if starts is None:
        inputs = F.pad(x, (0, 0, past, 0)).transpose(1, 2)
        return F.silu(F.conv1d(inputs, weight[:, None], bias, groups=x.shape[-1]).transpose(1, 2))
    number = F.pad(starts.cumsum(1), (past, 0), value=-1)
    windows = F.pad(x, (0, 0, past, 0)).unfold(1, past + 1, 1)
    seen = number.unfold(1, past + 1, 1) == number[:, past:, None]
    return F.silu((windows * seen[:, :, None] * weight).sum(-1) + bias)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """weight * y silu(z) / rms over each of `groups` equal parts: y and gate z float[..., W], weight float[W] -> the
    same. Raises ValueError for a width that the groups do not divide."""
    if y.shape[-1] % groups:
        raise ValueError(f"{groups} groups do not divide a width of {y.shape[-1]}")
    if _native([y, z, weight], y.shape[-1] // groups):
        rows = [tensor if tensor.dim() == 3 else tensor.reshape(1, -1, tensor.shape[-1]) for tensor in (y, z)]
        result: Tensor = mamba_native.gated_norm(*rows, weight, groups, eps)
        return result.view(y.shape)
    return gated_norm_plain(y, z, weight, groups, eps)


def gated_norm_plain(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """What `gated_norm` computes, in PyTorch."""
    parts = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2) * weight


@dataclass(frozen=True, eq=False)
class Mixer:
    """The weights of a mixer between its two projections, float32, contiguous.

    conv [K, W] and conv_bias [W] of the convolution's W = H P + 2 G N channels; dt_bias, a (negative), d [H];
    norm [H P]; groups: G; dt_min: time steps are clamped from below.
    """

    conv: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    a: Tensor
    d: Tensor
    norm: Tensor
    groups: int
    eps: float = 1e-5
    dt_min: float = 0.0

    @cached_property
    def heads(self) -> int:
        """H."""
        return len(self.a)

    @cached_property
    def dim(self) -> int:
        """P."""
        return self.width // self.heads

    @cached_property
    def state(self) -> int:
        """N."""
        return (len(self.conv_bias) - self.width) // (2 * self.groups)

    @cached_property
    def width(self) -> int:
        """H P."""
        return len(self.norm)

    @cached_property
    def inputs(self) -> int:
        """H P + W + H, what a token's step takes."""
        return self.width + len(self.conv_bias) + self.heads

    @cached_property
    def record(self) -> native.Mamba:
        """What the C reads."""
        return mamba_native.mixer_record(self)


@dataclass(frozen=True, eq=False)
class Slots:
    """What conversations keep: windows float32[S, K - 1, W], the last inputs of the convolution; states [S, H, P, N],
    float32, bfloat16 or float16."""

    windows: Tensor
    states: Tensor

    @classmethod
    def empty(cls, mixer: Mixer, count: int, dtype: torch.dtype = torch.float32) -> Slots:
        """Fresh ones. Raises ValueError for a dtype that states are not kept in."""
        if dtype not in STATES:
            raise ValueError(f"states are kept in {', '.join(map(str, STATES))}; got {dtype}")
        kernel, width = mixer.conv.shape
        states = Arena().zeros((count, mixer.heads, mixer.dim, mixer.state), dtype)
        return cls(torch.zeros(count, kernel - 1, width, dtype=torch.float32, device="cpu"), states)


def step(mixer: Mixer, parts: Tensor, slots: Slots, rows: Tensor, seed: int = 0) -> Tensor:
    """One token each of conversations: convolution, recurrence, gate and norm.

    parts float32[n, H P + W + H], z, x B C and dt of the input projection; rows int64[n], the conversations' slots, all
    different, which are brought forward. Returns float32[n, H P]. Raises IndexError for a slot that there is not,
    ValueError for parts of another shape.

    States of 16 bits are rounded stochastically, up with the probability of the part that is cut off, by a hash of the
    seed, the slot and the place: small changes are kept on average. y is of the state before it is rounded. float16
    ends at +-65504.
    """
    if parts.shape != (len(rows), mixer.inputs):
        raise ValueError(f"{len(rows)} rows, and parts of {list(parts.shape)}")
    if _native([parts, slots.windows], mixer.dim, mixer.state):
        return mamba_native.step(mixer, parts, slots, rows, seed)
    mamba_native.check(rows, len(slots.states))
    return step_plain(mixer, parts, slots, rows, seed)


def step_plain(mixer: Mixer, parts: Tensor, slots: Slots, rows: Tensor, seed: int = 0) -> Tensor:
    """What `step` computes, in PyTorch; with other random numbers."""
    inner, width = mixer.width, len(mixer.conv_bias)
    z, fresh, dt = parts.split([inner, width, mixer.heads], dim=-1)
    window = torch.cat([slots.windows[rows], fresh[:, None]], 1)
    slots.windows[rows] = window[:, 1:]
    x, b, c = F.silu((window * mixer.conv).sum(1) + mixer.conv_bias).split(
        [inner, *[mixer.groups * mixer.state] * 2], dim=-1
    )
    x, b, c = x.unflatten(1, (mixer.heads, -1)), b.unflatten(1, (mixer.groups, -1)), c.unflatten(1, (mixer.groups, -1))
    states = slots.states[rows].to(parts.dtype)
    y = recur(x, F.softplus(dt + mixer.dt_bias).clamp(min=mixer.dt_min), mixer.a, b, c, states) + mixer.d[:, None] * x
    generator = torch.Generator().manual_seed(seed)
    slots.states[rows] = stochastic_round(states, slots.states.dtype, generator)
    return gated_norm_plain(y.flatten(1), z, mixer.norm, mixer.groups, mixer.eps)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16 or float16, up or down by chance so that the mean is x; what is beyond the largest becomes
    that. To another dtype: as it is."""
    if dtype not in ROUNDED:
        return x.to(dtype)
    digits, least = ROUNDED[dtype]
    exponent = torch.frexp(x).exponent
    unit = torch.ldexp(torch.ones_like(x), (exponent - digits).clamp(min=least))
    rounded = torch.floor(x / unit + torch.rand(x.shape, generator=generator)) * unit
    most = torch.finfo(dtype).max
    return rounded.clamp(-most, most).to(dtype)
