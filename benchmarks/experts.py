"""The grouped product over NVFP4 experts beside a loop of torch's bf16 linears: `python benchmarks/experts.py [--json
FILE]`.

Nemotron Super's shapes scaled down: a latent width of 256, 64 experts of 672, 8 of them for every token. Layers rotate
over more memory than the cache holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from turns import FROM_MEMORY, built, following, main, microseconds, ratio, take_turns

from palaestra.kernels import nvfp4
from palaestra.kernels.experts import PackedExperts, Routing, pack_experts, route_plain
from palaestra.kernels.native import Library

WIDTH, INNER, COUNT, TOP = 256, 672, 64, 8
TOKENS = (1, 2, 4, 8, 16, 32, 64)
WEIGHTS = 2e8
"""A candidate's turn: about so many weights times tokens."""

Pair = tuple[Tensor, Tensor]


class Grouped:
    """Ours, with the next of the layers; calls do nothing beside."""

    def __init__(self, native: Library, layers: list[PackedExperts], x: Tensor, weights: Tensor) -> None:
        self.x, self.weights, self.y, self.layers = x, weights, torch.empty_like(x), layers
        threads, rest = torch.get_num_threads(), (x.data_ptr(), *x.shape, weights.data_ptr(), self.y.data_ptr())
        self.experts = native.experts
        self.following = following([(ctypes.byref(layer.record), *rest, threads) for layer in layers])

    def __call__(self) -> None:
        self.experts(*self.following())


def loop(layers: list[list[Pair]], x: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    """torch's, with the next of the layers: a loop over the experts that some token chose."""
    after, x, weights = following(layers), x.bfloat16(), weights.bfloat16()
    chosen = [(index, rows) for index in range(COUNT) if len(rows := weights[:, index].nonzero()[:, 0])]

    def call() -> Tensor:
        y, layer = torch.zeros_like(x), after()
        for index, rows in chosen:
            up, down = layer[index]
            hidden = torch.nn.functional.linear(x[rows], up).relu_().square_()
            y.index_add_(0, rows, torch.nn.functional.linear(hidden, down) * weights[rows, index, None])
        return y

    return call


def rows(native: Library) -> list[dict[str, Any]]:
    """A row a number of tokens, with torch's number of threads: medians in us, and how many times faster ours is."""
    torch.manual_seed(0)
    plain = [(torch.randn(INNER, WIDTH) / 16, torch.randn(WIDTH, INNER) / 26) for _ in range(COUNT)]
    ours = pack_experts(native, [(nvfp4.quantize(up), nvfp4.quantize(down)) for up, down in plain])
    packed = [
        ours,
        *(
            pack_experts(native, [(nvfp4.quantize(up), nvfp4.quantize(down)) for up, down in plain])
            for _ in range(FROM_MEMORY // ours.nbytes)
        ),
    ]
    size = 2 * COUNT * 2 * INNER * WIDTH
    theirs = [[(up.bfloat16(), down.bfloat16()) for up, down in plain] for _ in range(FROM_MEMORY // size + 1)]
    found = []
    for tokens in TOKENS:
        x, logits = torch.randn(tokens, WIDTH), torch.randn(tokens, COUNT)
        chosen, by = route_plain(logits, torch.zeros(COUNT), Routing(TOP))
        weights = torch.zeros(tokens, COUNT).scatter_(1, chosen, by)
        repeats = max(3, int(WEIGHTS / (tokens * TOP * 2 * INNER * WIDTH)))
        candidates = {"ours": Grouped(native, packed, x, weights), "torch, bf16": loop(theirs, x, weights)}
        seconds = take_turns(candidates, repeats)
        found.append(
            {
                "tokens": tokens,
                "threads": torch.get_num_threads(),
                **{f"{name}, us": microseconds(times) for name, times in seconds.items()},
                "times torch": ratio(seconds["torch, bf16"], seconds["ours"]),
            }
        )
    return found


if __name__ == "__main__":
    main(__doc__, lambda: rows(built()))
