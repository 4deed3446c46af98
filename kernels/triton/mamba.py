"""Mamba-2's decode step: convolution, recurrence, gate and grouped norm for one token of each of several conversations,
whose states lie in slots. The plain version: kernels/mamba.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.mamba import Mixer, Slots
from palaestra.kernels.triton.device import power_of_two, require
from palaestra.kernels.triton.formats import to_half

WARPS = 8
"""With 4 the stochastic rounding of a state [64, 128] does not fit into the registers."""
HALVES = {torch.float16: (10, 2.0**-14, 65504.0), torch.bfloat16: (7, 2.0**-126, 3.3895313892515355e38)}
"""Of the dtypes that states may be rounded to: bits of the mantissa, the smallest normal, the largest number."""


def step(projected: Tensor, mixer: Mixer, pool: Slots, slots: Tensor, seed: int | None = None) -> Tensor:
    """What in_proj made of one token, float [B, heads dim + C + heads] = [z | xBC | dt], -> what out_proj takes, in the
    same dtype [B, heads dim].

    slots: int64[B], distinct places in the pool, whose states move on by the token. `seed`: states are rounded to their
    dtype stochastically, with Philox numbers; pass another one for every token. None: to nearest.
    Raises ValueError for a seed with float32 states, a convolution of one token, and another dtype.
    """
    require(projected, torch.bfloat16, torch.float32)
    require(pool.states, torch.float32, *HALVES)
    if seed is not None and pool.states.dtype not in HALVES:
        raise ValueError("stochastic rounding needs states in float16 or bf16")
    _, heads, dim, state = pool.states.shape
    kernel, channels = mixer.conv.shape
    if kernel < 2:
        raise ValueError("a convolution of one token has no window; the kernel needs at least two")
    width, batch = heads * dim, len(projected)
    y = projected.new_empty(batch, width)
    if not batch:
        return y
    projected = projected.contiguous()
    gated = torch.empty(batch, width, device=y.device)
    mantissa, lowest, largest = HALVES.get(pool.states.dtype, HALVES[torch.bfloat16])
    _recur[batch, heads](
        projected, mixer.conv, mixer.conv_bias, mixer.dt_bias, mixer.a, mixer.d, pool.windows, pool.states, slots,
        gated, mixer.dt_min, seed or 0, HEADS=heads, GROUPS=mixer.groups, DIM=dim, STATE=state, KERNEL=kernel,
        STOCHASTIC=seed is not None,
        MANTISSA=mantissa, LOWEST=lowest, LARGEST=largest, WIDE=power_of_two(dim), DEEP=power_of_two(state),
        num_warps=WARPS,
    )  # fmt: skip
    _norm[batch, mixer.groups](
        gated, mixer.norm, y, projected, pool.windows, slots, mixer.eps, width, channels, heads,
        GROUPS=mixer.groups, KERNEL=kernel, WIDE=power_of_two(width // mixer.groups),
        CHANNELS=power_of_two(channels // mixer.groups),
    )  # fmt: skip
    return y


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); what 1 + exp(x) loses in rounding is made good, since there is no log1p."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _convolved(new, window, conv, bias, channel, real, CHANNELS, KERNEL: tl.constexpr):
    """Some channels after the causal convolution and silu, float32."""
    acc = tl.load(bias + channel, mask=real, other=0.0)
    for past in tl.static_range(KERNEL - 1):
        value = tl.load(window + past * CHANNELS + channel, mask=real, other=0.0).to(tl.float32)
        acc += value * tl.load(conv + past * CHANNELS + channel, mask=real, other=0.0)
    value = tl.load(new + channel, mask=real, other=0.0).to(tl.float32)
    return _silu(acc + value * tl.load(conv + (KERNEL - 1) * CHANNELS + channel, mask=real, other=0.0))


@triton.jit(do_not_specialize=["seed"])
def _recur(
    projected, conv, conv_bias, dt_bias, a, d, windows, states, slots, gated, dt_min, seed,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, KERNEL: tl.constexpr,
    STOCHASTIC: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """One head of one conversation: gated float32 [B, heads dim]. Windows are read alone, since the heads of a group
    share channels; `_norm` moves them on."""
    WIDTH: tl.constexpr = HEADS * DIM
    CHANNELS: tl.constexpr = WIDTH + 2 * GROUPS * STATE
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, group = tl.load(slots + row).to(tl.int64), head // (HEADS // GROUPS)
    wide, deep = tl.arange(0, WIDE), tl.arange(0, DEEP)
    place = head * DIM + wide
    new = projected + row * (WIDTH + CHANNELS + HEADS) + WIDTH
    window = windows + slot * (KERNEL - 1) * CHANNELS
    x = _convolved(new, window, conv, conv_bias, place, wide < DIM, CHANNELS, KERNEL)
    b = _convolved(new, window, conv, conv_bias, WIDTH + group * STATE + deep, deep < STATE, CHANNELS, KERNEL)
    c = _convolved(
        new, window, conv, conv_bias, WIDTH + (GROUPS + group) * STATE + deep, deep < STATE, CHANNELS, KERNEL
    )
    dt = _softplus(tl.load(new + CHANNELS + head).to(tl.float32) + tl.load(dt_bias + head))
    dt = tl.maximum(dt, dt_min)
    inside = (wide < DIM)[:, None] & (deep < STATE)[None, :]
    offset = (head * DIM + wide[:, None]) * STATE + deep[None, :]
    at = states + slot * WIDTH * STATE + offset
    state = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    state = state * tl.exp(dt * tl.load(a + head)) + (dt * x)[:, None] * b[None, :]
    y = tl.sum(state * c[None, :], 1) + tl.load(d + head) * x
    z = tl.load(new - WIDTH + place, mask=wide < DIM, other=0.0).to(tl.float32)
    tl.store(gated + row * WIDTH + place, y * _silu(z), mask=wide < DIM)
    if STOCHASTIC:
        state = to_half(state, seed, row * WIDTH * STATE + offset, MANTISSA, LOWEST, LARGEST)
    tl.store(at, state, mask=inside)


@triton.jit
def _norm(
    gated, norm, y, projected, windows, slots, eps, width, channels, heads,
    GROUPS: tl.constexpr, KERNEL: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One group's RMS norm of one conversation, and one part of its window moved on."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDE)
    inside, place = column < width // GROUPS, group * (width // GROUPS) + column
    value = tl.load(gated + row * width + place, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / (width // GROUPS) + eps)
    tl.store(y + row * width + place, value * scale * tl.load(norm + place, mask=inside, other=0.0), mask=inside)

    column = tl.arange(0, CHANNELS)
    inside, channel = column < channels // GROUPS, group * (channels // GROUPS) + column
    at = windows + tl.load(slots + row).to(tl.int64) * (KERNEL - 1) * channels + channel
    for past in tl.static_range(KERNEL - 2):
        tl.store(at + past * channels, tl.load(at + (past + 1) * channels, mask=inside), mask=inside)
    new = tl.load(projected + row * (width + channels + heads) + width + channel, mask=inside)
    tl.store(at + (KERNEL - 2) * channels, new, mask=inside)
