"""The routed experts of a LatentMoE with NVFP4 weights, and their choice. The plain versions: kernels/experts.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palaestra.kernels.experts import Routing
from palaestra.kernels.nvfp4 import NVFP4
from palaestra.kernels.triton.device import dot_type, power_of_two, require
from palaestra.kernels.triton.products import product, tile


def route(logits: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """float32[T, E] and the correction bias float32[E] -> chosen experts int64[T, k], the best first (of equal scores
    the lower index), and their weights float32[T, k].

    Scores are sigmoids; the bias takes part in the choice alone. A group counts by its two best scores; in the others
    every score is 0, as in the plain version.
    """
    require(logits, torch.float32)
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, routing.top, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, routing.top, device=logits.device)
    if tokens:
        _route[(tokens,)](
            logits.contiguous(), bias, chosen, weights, experts, routing.factor,
            GROUPS=routing.groups, WIDE=power_of_two(experts), TOP=routing.top, TOP_GROUPS=routing.top_groups,
            SLOTS=power_of_two(routing.top), GROUP_SLOTS=power_of_two(routing.groups), NORMALISE=routing.normalise,
        )  # fmt: skip
    return chosen, weights


@triton.jit
def _best(scores, index):
    """The largest score and, of equal ones, the lowest index; some index if all are NaN."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, index, index.shape[0] - 1), 0)


@triton.jit
def _route(
    logits, bias, chosen, weights, E, factor,
    GROUPS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, TOP_GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, WIDE)
    real = expert < E
    score = tl.sigmoid(tl.load(logits + token * E + expert, mask=real, other=0.0))
    biased = tl.where(real, score + tl.load(bias + expert, mask=real, other=0.0), float("-inf"))
    if GROUPS > 1:
        group, number = expert // (E // GROUPS), tl.arange(0, GROUP_SLOTS)
        sums = tl.full((GROUP_SLOTS,), float("-inf"), tl.float32)
        for one in tl.static_range(GROUPS):
            inside = tl.where(group == one, biased, float("-inf"))
            first, at = _best(inside, expert)
            second, _ = _best(tl.where(expert == at, float("-inf"), inside), expert)
            sums = tl.where(number == one, first + second, sums)
        keep = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            _, at = _best(sums, number)
            keep = keep | (group == at)
            sums = tl.where(number == at, float("-inf"), sums)
        biased = tl.where(keep | (expert >= E), biased, 0.0)
    slot = tl.arange(0, SLOTS)
    found, weight = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for place in tl.static_range(TOP):
        _, at = _best(biased, expert)
        found = tl.where(slot == place, at, found)
        weight = tl.where(slot == place, tl.sum(tl.where(expert == at, score, 0.0), 0), weight)
        biased = tl.where(expert == at, float("-inf"), biased)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(chosen + token * TOP + slot, tl.minimum(found, E - 1), mask=slot < TOP)
    tl.store(weights + token * TOP + slot, weight * factor, mask=slot < TOP)


class _Plan(NamedTuple):
    """Pairs of token and expert, sorted by expert: where pair i of the sorted ones stands in int64[T, k]; and of each
    tile its expert, its first pair and the end of the expert's pairs (not above the first: an empty tile)."""

    order: Tensor
    expert: Tensor
    first: Tensor
    last: Tensor


def experts(x: Tensor, up: NVFP4, down: NVFP4, chosen: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts' weighted sum, each down(relu(up(x))^2).

    x bf16 or float32 [T, width]; up NVFP4 [E, inner, width]; down NVFP4 [E, width, inner]; chosen int64[T, k]; weights
    float32[T, k]. Returns [T, width] in the dtype of `x`; a token's k outputs are added in a fixed order. Nothing waits
    for the device. Raises ValueError for another dtype.
    """
    require(x, torch.bfloat16, torch.float32)
    tokens, top = chosen.shape
    if not tokens:
        return torch.empty_like(x)
    count = len(up.codes)
    rows = tile(triton.cdiv(tokens * top, count)).rows
    plan = _plan(chosen, count, rows)
    hidden = torch.empty(tokens * top, up.codes.shape[1], dtype=x.dtype, device=x.device)
    _grouped(x.contiguous(), up, hidden, plan, weights, rows, True)
    outputs = torch.empty(tokens * top, down.codes.shape[1], dtype=torch.float32, device=x.device)
    _grouped(hidden, down, outputs, plan, weights, rows, False)
    return outputs.view(tokens, top, -1).sum(1).to(x.dtype)


def _plan(chosen: Tensor, count: int, rows: int) -> _Plan:
    """Tiles of `rows` pairs. There are as many as could be needed, since how many are is known to the device alone."""
    experts, order = chosen.flatten().sort(stable=True)
    pairs = len(order)
    numbers = torch.arange(count, device=chosen.device)
    first, last = torch.searchsorted(experts, numbers), torch.searchsorted(experts, numbers, right=True)
    tiles = (last - first + rows - 1) // rows
    ends = tiles.cumsum(0)
    most = min(pairs, pairs // rows + min(count, pairs))
    index = torch.arange(most, device=chosen.device)
    expert = torch.searchsorted(ends, index, right=True).clamp(max=count - 1)
    start = first[expert] + (index - (ends - tiles)[expert]) * rows
    return _Plan(order, expert, start, last[expert])


def _grouped(x: Tensor, weight: NVFP4, y: Tensor, plan: _Plan, weights: Tensor, rows: int, up: bool) -> None:
    outputs, columns = weight.codes.shape[1], weight.codes.shape[2] * 2
    block = tile(rows)
    _products[triton.cdiv(outputs, block.outputs), len(plan.expert)](
        x, weight.codes.contiguous(), weight.scales.contiguous().view(torch.uint8), weight.scale2.contiguous(), y,
        plan.order, plan.expert, plan.first, plan.last, weights.contiguous(), outputs, columns,
        TOP=weights.shape[1], UP=up, ROWS=block.rows, OUTPUTS=block.outputs, COLUMNS=block.columns,
        VECTOR=block.vector, DOT=dot_type(x),
    )  # fmt: skip


@triton.jit
def _products(
    x, codes, scales, scale2, y, order, experts, firsts, lasts, weights, N, K,
    TOP: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """UP: rows of x are gathered by token, the result is squared above 0 and stored in the sorted order. Otherwise x is
    sorted, the result is weighted and stored at its pair's place."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    first, last = tl.load(firsts + tile), tl.load(lasts + tile)
    if first >= last:
        return
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = first + tl.arange(0, ROWS)
    seen = row < last
    pair = tl.load(order + row, mask=seen, other=0)
    source = pair // TOP if UP else row
    codes, scales = codes + expert * N * (K // 2), scales + expert * N * (K // 16)
    acc = product(x, source, seen, codes, scales, output, N, K, 0, K, COLUMNS, VECTOR, DOT) * tl.load(scale2 + expert)
    if UP:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    else:
        acc = acc * tl.load(weights + pair, mask=seen, other=0.0)[:, None]
    target = row if UP else pair
    tl.store(y + target[:, None] * N + output[None, :], acc, mask=seen[:, None] & (output < N)[None, :])
