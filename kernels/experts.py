"""A mixture of experts, as Nemotron 3 has it: a sigmoid router, and each expert's down(relu(up(x))^2) for the rows that
chose it, over packed weights on the CPU in C. Plain versions beside."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palaestra.kernels.linear import Packed, Weight, linear_plain, pack
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import MLP, TILE, Library, MoE, floats, pointer


@dataclass(frozen=True)
class Routing:
    """How experts are chosen: the best `top` by score and bias, of the best `top_groups` of `groups` groups (a group by
    its two best); their scores are their weights, normalised to a sum of one if so wished, times `factor`."""

    top: int
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    factor: float = 1.0


def choose(scores: Tensor, routing: Routing) -> Tensor:
    """float[T, E] -> the chosen experts int64[T, top], those outside the best groups counting as 0."""
    if routing.groups > 1:
        groups = scores.unflatten(-1, (routing.groups, -1))
        best = groups.topk(2).values.sum(-1).topk(routing.top_groups).indices
        keep = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        scores = groups.masked_fill(~keep[..., None], 0.0).flatten(-2)
    return scores.topk(routing.top).indices


def route(library: Library, logits: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The gate's outputs float32[T, E] and the correction bias float32[E], of the choice alone -> the chosen experts
    int64[T, top], the best first, and their weights float32[T, top]."""
    gate, bias = logits.float().clone(), bias.float().contiguous()
    chosen = torch.empty(len(gate), routing.top, dtype=torch.int64, device="cpu")
    weights = floats(len(gate), routing.top)
    record = MoE(
        bias=pointer(bias),
        count=gate.shape[1],
        top=routing.top,
        groups=routing.groups,
        top_groups=routing.top_groups,
        normalise=int(routing.normalise),
        factor=routing.factor,
    )
    library.route(ctypes.byref(record), pointer(gate), len(gate), pointer(chosen), pointer(weights))
    return chosen, weights


def route_plain(logits: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """What `route` computes, in PyTorch and the logits' dtype; gradients reach the weights."""
    scores = torch.sigmoid(logits)
    chosen = choose(scores.detach() + bias, routing)
    weights = scores.gather(1, chosen)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * routing.factor


@dataclass(frozen=True)
class PackedExperts:
    """Experts [inner, width] and [width, inner] that `record` points to; `parts` hold them."""

    record: MoE
    parts: tuple[object, ...]
    width: int
    nbytes: int


def pack_experts(library: Library, weights: Sequence[tuple[Weight, Weight]]) -> PackedExperts:
    """Pack every expert's up [inner, width] and down [width, inner], all of the same shapes.

    Raises ValueError as `pack`, for other shapes, and for widths that are no multiples of 16.
    """
    arena = Arena()
    packed = [(pack(library, up, arena), pack(library, down, arena)) for up, down in weights]
    inner, width = packed[0][0].rows, packed[0][0].columns
    if any((up.rows, up.columns, down.rows, down.columns) != (inner, width, width, inner) for up, down in packed):
        raise ValueError(f"every expert needs an up of [{inner}, {width}] and a down of [{width}, {inner}]")
    if inner % TILE or width % TILE:
        raise ValueError(f"experts need widths that are multiples of {TILE}; got {width} and {inner}")
    records = (MLP * len(packed))(*(MLP(up.record, down.record) for up, down in packed))
    matrices: list[Packed] = [matrix for pair in packed for matrix in pair]
    nbytes = sum(matrix.nbytes for matrix in matrices)
    return PackedExperts(MoE(experts=records, count=len(packed)), (records, matrices), width, nbytes)


def experts(
    library: Library, x: Tensor, chosen: Tensor, weights: Tensor, packed: PackedExperts, threads: int = 1
) -> Tensor:
    """The weighted sums of the chosen experts: float [T, width], int64[T, top] and float[T, top] -> float32[T, width].
    Sums go in the order of the experts, so that a row's result owes nothing to its company.

    Raises ValueError for other shapes, IndexError for an expert that is not there.
    """
    count = packed.record.count
    if x.shape != (len(chosen), packed.width) or chosen.shape != weights.shape:
        shapes = ", ".join(str(list(part.shape)) for part in (x, chosen, weights))
        raise ValueError(f"{count} experts of width {packed.width}; got x, chosen and weights of {shapes}")
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        raise IndexError(f"{count} experts; {int(chosen.min())} to {int(chosen.max())} were chosen")
    by_expert = floats(len(x), count).zero_().scatter_add_(1, chosen, weights.detach().float())
    x, y = x.detach().float().contiguous(), floats(*x.shape)
    record = ctypes.byref(packed.record)
    if library.experts(record, pointer(x), len(x), packed.width, pointer(by_expert), pointer(y), threads):
        raise MemoryError(f"no memory for {len(x)} rows of {packed.width}")
    return y


def experts_plain(x: Tensor, chosen: Tensor, weights: Tensor, experts: Sequence[tuple[Weight, Weight]]) -> Tensor:
    """What `experts` computes, in PyTorch, for every expert's up and down."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for index, (up, down) in enumerate(experts):
        rows, place = (chosen == index).nonzero(as_tuple=True)
        hidden = linear_plain(linear_plain(x[rows], up).relu().square(), down)
        y[rows] += hidden * weights[rows, place, None]
    return y
