"""One token's attention over a paged cache, the sequence split among programs (flash-decoding, arXiv 2307.08691 and
pytorch.org/blog/flash-decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.attention import Pages
from palaestra.kernels.triton.device import dot, dot_type, power_of_two, processors, require
from palaestra.kernels.triton.formats import E4M3_UNIT, e4m3

TOKENS = 64
"""Tokens of the cache that a program takes at a time."""
SMALLEST_DOT = 16


def attend(q: Tensor, pages: Pages, lengths: Tensor) -> Tensor:
    """bf16 or float32 [B, heads, dim] -> the same: softmax(q K^T / sqrt(dim)) V over the first `lengths` int64[B]
    tokens of each sequence's own pages.

    A sequence of length 0 gives zeros. Raises ValueError for another dtype or layout. Nothing waits for the device.
    """
    require(q, torch.bfloat16, torch.float32)
    require(pages.keys, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    if pages.keys.stride() != pages.values.stride() or pages.keys.stride(-1) != 1:
        raise ValueError("keys and values must lie alike, the values of a head side by side")
    batch, heads, dim = q.shape
    _, kv_heads, page, _ = pages.keys.shape
    if not batch:
        return torch.empty_like(q)
    room = triton.cdiv(pages.table.shape[1] * page, TOKENS)
    parts = max(1, min(room, triton.cdiv(2 * processors(q.device), batch * kv_heads)))
    outputs = torch.empty(batch, heads, parts, dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(batch, heads, parts, 2, dtype=torch.float32, device=q.device)
    fp8 = pages.keys.dtype == torch.float8_e4m3fn
    page_step, head_step, token_step, _ = pages.keys.stride()
    _attend[batch, kv_heads, parts](
        q.contiguous(), *(part.view(torch.uint8) if fp8 else part for part in (pages.keys, pages.values)),
        pages.table.contiguous(), lengths.contiguous(), float(pages.key_scale), outputs, weights,
        pages.table.shape[1], dim**-0.5, page_step, token_step, head_step,
        HEADS=heads // kv_heads, DIM=dim, PAGE=page, PARTS=parts, FP8=fp8, DOT=dot_type(q, pages.keys), TOKENS=TOKENS,
        ROWS=max(power_of_two(heads // kv_heads), SMALLEST_DOT), WIDE=max(power_of_two(dim), SMALLEST_DOT),
    )  # fmt: skip
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    _reduce[(batch * heads,)](
        outputs, weights, float(pages.value_scale), y,
        DIM=dim, PARTS=parts, SLOTS=power_of_two(parts), WIDE=power_of_two(dim),
    )  # fmt: skip
    return y


@triton.jit
def _cached(at, there, FP8: tl.constexpr):
    values = tl.load(at, mask=there, other=0)
    if FP8:
        values = e4m3(values) * E4M3_UNIT
    return values


@triton.jit
def _attend(
    q, keys, values, table, lengths, key_scale, outputs, weights, pages, factor, page_step, token_step, head_step,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
    DOT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of one sequence, the query heads of one KV head, over one part of the tokens: the largest score, and the sums of
    exp(score - largest) and of the values so weighted."""
    row, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, TOKENS), PARTS) * TOKENS
    head, column, token = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TOKENS)
    place = (row * tl.num_programs(1) + kv) * HEADS + head
    inside, wide = head < HEADS, column < DIM
    query = tl.load(q + place[:, None] * DIM + column[None, :], mask=inside[:, None] & wide[None, :], other=0)
    factor *= key_scale
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, length), TOKENS):
        at = start + token
        seen = at < length
        page = tl.load(table + row * pages + at // PAGE, mask=seen, other=0).to(tl.int64)
        offset = page * page_step + (at % PAGE) * token_step + kv * head_step
        there = seen[:, None] & wide[None, :]
        k = _cached(keys + offset[:, None] + column[None, :], there, FP8)
        v = _cached(values + offset[:, None] + column[None, :], there, FP8)
        scores = dot(query, tl.trans(k), DOT) * factor
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weight, old = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        total = total * old + tl.sum(weight, 1)
        acc = dot(weight, v, DOT, acc * old[:, None])
        largest = new
    slot = place * PARTS + part
    tl.store(outputs + slot[:, None] * DIM + column[None, :], acc, mask=inside[:, None] & wide[None, :])
    tl.store(weights + slot * 2, largest, mask=inside)
    tl.store(weights + slot * 2 + 1, total, mask=inside)


@triton.jit
def _reduce(
    outputs, weights, value_scale, y, DIM: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr
):
    """The parts' sums of one head, weighted by their exponentials; a part without tokens has the weight 0."""
    place = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, SLOTS), tl.arange(0, WIDE)
    inside, wide = part < PARTS, column < DIM
    slot = place * PARTS + part
    largest = tl.load(weights + slot * 2, mask=inside, other=float("-inf"))
    total = tl.load(weights + slot * 2 + 1, mask=inside, other=0.0)
    factor = tl.exp(largest - tl.maximum(tl.max(largest, 0), -3e38))  # the bound: where no part has tokens
    at = outputs + slot[:, None] * DIM + column[None, :]
    acc = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0)
    whole = tl.sum(total * factor, 0)
    mean = tl.sum(acc * factor[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(y + place * DIM + column, mean * value_scale, mask=wide)
