"""Mamba-2's recurrence over packed sequences, a chunk at a time by matrix products (SSD, arXiv 2405.21060), with its
backward. The plain version is model/mamba.py's scan.

With L the running sum of dt a within a chunk, u = dt x and S the state before it:
    y_t = sum over s <= t of exp(L_t - L_s) (c_t . b_s) u_s + exp(L_t) S c_t
    S'  = exp(L_last) S + sum over s of exp(L_last - L_s) u_s b_s^T
Forward: what each chunk adds to the state; the states before the chunks, one after the other; the outputs. Backward:
the same two passes from the end, with dy, c and exp(L_t) in the place of u, b and exp(L_last - L_s), give the gradient
of the state after each chunk; then each chunk's gradients. States are computed anew, not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.triton.device import dot, dot_type, power_of_two, require

CHUNK = 64
SMALLEST_DOT = 16
WARPS = 8
"""With 4, as the assembler for compute capability 9.0 says, twice as much or more goes from registers to memory."""
PASSED = 1024
"""Values of a state that one program passes from chunk to chunk."""


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence state = exp(dt a) state + dt x b^T, y = state c, over S sequences that lie one after the other.

    x bf16 or float32 [T, heads, P]; dt float32[T, heads]; a float32[heads], negative; b, c [T, groups, N] in the dtype
    of x; state float32[S, heads, P, N], before each sequence; starts int64[S + 1], its ends too (cu_seqlens). Returns y
    [T, heads, P] in the dtype of x and the last states float32[S, heads, P, N]. Differentiable in all but `starts`.
    Nothing waits for the device. Raises ValueError for another dtype.
    """
    require(x, torch.bfloat16, torch.float32)
    y, last = _Scan.apply(x, dt, a, b, c, state, starts)
    return y, last


class _Chunks(NamedTuple):
    """Of each chunk its tokens' begin and end (equal: no chunk); of each sequence its first chunk int64[S + 1]."""

    begin: Tensor
    end: Tensor
    first: Tensor


def _chunks(starts: Tensor, tokens: int) -> _Chunks:
    """No chunk reaches over a sequence's end. As many as could be needed: how many are, the device alone knows."""
    counts = (starts.diff() + CHUNK - 1) // CHUNK
    ends = counts.cumsum(0)
    index = torch.arange(tokens // CHUNK + len(counts), device=starts.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=len(counts) - 1)
    last = starts[1:][sequence]
    begin = starts[sequence] + (index - (ends - counts)[sequence]) * CHUNK
    return _Chunks(
        torch.minimum(begin, last), torch.minimum(begin + CHUNK, last), torch.nn.functional.pad(ends, (1, 0))
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = tuple(part.contiguous() for part in (x, dt, a, b, c, state))
        x, dt, a, b, c, state = inputs
        chunks = _chunks(starts, len(x))
        ctx.save_for_backward(*inputs, starts)
        before, last = _states(x, dt, a, b, state, chunks, False)
        y = torch.empty_like(x)
        _output[len(chunks.begin), x.shape[1]](x, dt, a, b, c, before, y, *chunks[:2], **_shapes(x, b))
        return y, last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, state, starts = ctx.saved_tensors
        dy, dlast = gradients[0].contiguous(), gradients[1].contiguous()
        chunks = _chunks(starts, len(x))
        before, _ = _states(x, dt, a, b, state, chunks, False)
        after, dstate = _states(dy, dt, a, c, dlast, chunks, True)
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        da = torch.empty(len(chunks.begin), x.shape[1], device=x.device)
        db, dc = (torch.empty(*x.shape[:2], b.shape[2], device=x.device) for _ in range(2))
        _gradients[len(chunks.begin), x.shape[1]](
            x, dt, a, b, c, before, dy, after, dx, ddt, da, db, dc, *chunks[:2], **_shapes(x, b)
        )
        db, dc = (part.unflatten(1, (b.shape[1], -1)).sum(2).to(b.dtype) for part in (db, dc))
        return dx, ddt, da.sum(0), db, dc, dstate, None


def _shapes(x: Tensor, b: Tensor) -> dict[str, Any]:
    return {
        "HEADS": x.shape[1],
        "GROUPS": b.shape[1],
        "DIM": x.shape[2],
        "STATE": b.shape[2],
        "WIDE": max(power_of_two(x.shape[2]), SMALLEST_DOT),
        "DEEP": max(power_of_two(b.shape[2]), SMALLEST_DOT),
        "CHUNK": CHUNK,
        "DOT": dot_type(x),
        "num_warps": WARPS,
    }


def _states(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor, chunks: _Chunks, backward: bool
) -> tuple[Tensor, Tensor]:
    """The states before each chunk float32[chunks, heads, P, N] and after all; backward the gradients of the states
    after each chunk and before all."""
    states = torch.empty(len(chunks.begin), *state.shape[1:], device=x.device)
    decays = torch.empty(len(chunks.begin), x.shape[1], device=x.device)
    _added[len(chunks.begin), x.shape[1]](x, dt, a, b, states, decays, *chunks[:2], BACKWARD=backward, **_shapes(x, b))
    last = torch.empty_like(state)
    size = state.shape[2] * state.shape[3]
    _pass[len(state), x.shape[1], triton.cdiv(size, PASSED)](
        states, decays, state, last, chunks.first, x.shape[1], size, BACKWARD=backward, PASSED=PASSED
    )
    return states, last


@triton.jit
def _rows(at, begin, end, place, COUNT: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """Addresses of the vectors number `place` of [T, COUNT, SIZE] from `begin` to `end`, [CHUNK, PADDED], and which are
    there."""
    token, column = begin + tl.arange(0, CHUNK), tl.arange(0, PADDED)
    offset = (token[:, None] * COUNT + place) * SIZE + column[None, :]
    return at + offset, (token < end)[:, None] & (column < SIZE)[None, :]


@triton.jit
def _steps(dt, a, begin, end, head, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """dt float32[CHUNK], 0 beyond the end, and dt a."""
    token = begin + tl.arange(0, CHUNK)
    step = tl.load(dt + token * HEADS + head, mask=token < end, other=0.0)
    return step, step * tl.load(a + head)


@triton.jit
def _state(
    at, chunk, head,
    HEADS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Addresses of a chunk's state [WIDE, DEEP], and which are there."""
    wide, deep = tl.arange(0, WIDE)[:, None], tl.arange(0, DEEP)[None, :]
    return at + ((chunk * HEADS + head) * DIM + wide) * STATE + deep, (wide < DIM) & (deep < STATE)


@triton.jit
def _added(
    x, dt, a, b, states, decays, begins, ends,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to one head's state, and by what it multiplies it."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(begins + chunk), tl.load(ends + chunk)
    step, log = _steps(dt, a, begin, end, head, HEADS, CHUNK)
    total = tl.sum(log, 0)
    decay = tl.cumsum(log, 0)
    weight = tl.exp(decay) if BACKWARD else tl.exp(total - decay) * step
    at, there = _rows(x, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    left = tl.load(at, mask=there, other=0.0).to(tl.float32) * weight[:, None]
    at, there = _rows(b, begin, end, head // (HEADS // GROUPS), GROUPS, STATE, DEEP, CHUNK)
    added = dot(tl.trans(left), tl.load(at, mask=there, other=0.0), DOT)
    at, there = _state(states, chunk, head, HEADS, DIM, STATE, WIDE, DEEP)
    tl.store(at, added, mask=there)
    tl.store(decays + chunk * HEADS + head, tl.exp(total))


@triton.jit
def _pass(states, decays, first, last, chunks, heads, size, BACKWARD: tl.constexpr, PASSED: tl.constexpr):
    """Replaces what each chunk adds by the state before it, in the order of the chunks or from their end."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.program_id(2) * PASSED + tl.arange(0, PASSED)
    inside = place < size
    state = tl.load(first + (sequence * heads + head) * size + place, mask=inside, other=0.0)
    begin, end = tl.load(chunks + sequence), tl.load(chunks + sequence + 1)
    for index in range(begin, end):
        number = (begin + end - 1 - index if BACKWARD else index) * heads + head
        at = states + number * size + place
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = state * tl.load(decays + number) + added
    tl.store(last + (sequence * heads + head) * size + place, state, mask=inside)


@triton.jit
def _within(log, CHUNK: tl.constexpr):
    """exp(L_t - L_s) for s <= t, else 0, and L."""
    token = tl.arange(0, CHUNK)
    decay = tl.cumsum(log, 0)
    causal = token[:, None] >= token[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, decay[:, None] - decay[None, :], 0.0)), 0.0), decay


@triton.jit
def _output(
    x, dt, a, b, c, before, y, begins, ends,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk's outputs of one head."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(begins + chunk), tl.load(ends + chunk)
    if begin >= end:
        return
    group = head // (HEADS // GROUPS)
    step, log = _steps(dt, a, begin, end, head, HEADS, CHUNK)
    within, decay = _within(log, CHUNK)
    at, there = _rows(b, begin, end, group, GROUPS, STATE, DEEP, CHUNK)
    right = tl.load(at, mask=there, other=0.0)
    at, there = _rows(c, begin, end, group, GROUPS, STATE, DEEP, CHUNK)
    left = tl.load(at, mask=there, other=0.0)
    at, there = _state(before, chunk, head, HEADS, DIM, STATE, WIDE, DEEP)
    state = tl.load(at, mask=there, other=0.0)
    acc = dot(left, tl.trans(state), DOT) * tl.exp(decay)[:, None]
    at, there = _rows(x, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    values = tl.load(at, mask=there, other=0.0)
    acc += dot(dot(left, tl.trans(right), DOT) * within * step[None, :], values, DOT)
    at, there = _rows(y, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    tl.store(at, acc, mask=there)


@triton.jit
def _gradients(
    x, dt, a, b, c, before, dy, after, dx, ddt, da, db, dc, begins, ends,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk's gradients of one head, given that of the state after it: dx, ddt, its part of da [chunks, heads], and
    its head's parts of db and dc float32[T, heads, N].

    exp(L_t) multiplies c_t wherever that stands and exp(-L_t) b_t, so that the gradient of L_t is c_t . dc_t less
    b_t . db_t; exp(L_last) multiplies the whole state after, so that the last token's has also <dS', S'>.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(begins + chunk), tl.load(ends + chunk)
    if begin >= end:
        tl.store(da + chunk * HEADS + head, 0.0)
        return
    group = head // (HEADS // GROUPS)
    step, log = _steps(dt, a, begin, end, head, HEADS, CHUNK)
    within, decay = _within(log, CHUNK)
    total = tl.sum(log, 0)
    grown, left = tl.exp(decay)[:, None], tl.exp(total - decay)[:, None]
    at, there = _rows(b, begin, end, group, GROUPS, STATE, DEEP, CHUNK)
    keys = tl.load(at, mask=there, other=0.0)
    at, there = _rows(c, begin, end, group, GROUPS, STATE, DEEP, CHUNK)
    queries = tl.load(at, mask=there, other=0.0)
    at, there = _rows(x, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    values = tl.load(at, mask=there, other=0.0)
    at, there = _rows(dy, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    upstream = tl.load(at, mask=there, other=0.0)
    at, there = _state(before, chunk, head, HEADS, DIM, STATE, WIDE, DEEP)
    state = tl.load(at, mask=there, other=0.0)
    at, there = _state(after, chunk, head, HEADS, DIM, STATE, WIDE, DEEP)
    beyond = tl.load(at, mask=there, other=0.0)

    scores = dot(queries, tl.trans(keys), DOT) * within
    paired = dot(upstream, tl.trans(values), DOT) * step[None, :]
    du = dot(tl.trans(scores), upstream, DOT)
    carried = dot(keys, tl.trans(beyond), DOT) * left
    inward = dot(upstream, state, DOT) * grown
    mixed = paired * within
    deep_c = dot(mixed, keys, DOT) + inward
    weighted = values.to(tl.float32) * step[:, None]
    deep_b = dot(tl.trans(mixed), queries, DOT) + dot(weighted, beyond, DOT) * left

    slope = tl.sum(deep_c * queries.to(tl.float32) - deep_b * keys.to(tl.float32), 1)
    end_slope = tl.sum(weighted * carried) + tl.exp(total) * tl.sum(beyond * state)
    running = tl.cumsum(slope, 0, reverse=True) + end_slope
    du += carried
    at, there = _rows(dx, begin, end, head, HEADS, DIM, WIDE, CHUNK)
    tl.store(at, du * step[:, None], mask=there)
    token = begin + tl.arange(0, CHUNK)
    direct = tl.sum(du * values.to(tl.float32), 1)
    tl.store(ddt + token * HEADS + head, direct + running * tl.load(a + head), mask=token < end)
    tl.store(da + chunk * HEADS + head, tl.sum(running * step, 0))
    at, there = _rows(db, begin, end, head, HEADS, STATE, DEEP, CHUNK)
    tl.store(at, deep_b, mask=there)
    at, there = _rows(dc, begin, end, head, HEADS, STATE, DEEP, CHUNK)
    tl.store(at, deep_c, mask=there)
