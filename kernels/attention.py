"""Attention of one new token a conversation over keys and values that lie in pages, on the CPU in C; plain beside.

Few heads of keys and values serve groups of queries. Prompts go through PyTorch's own attention.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from palaestra.kernels import native
from palaestra.kernels.fp8 import LARGEST
from palaestra.kernels.linear import DTYPES
from palaestra.kernels.native import KINDS, TILE, Library, pointer


@dataclass(frozen=True)
class Pages:
    """keys and values [pages, kv heads, tokens a page, dim] in float32, bf16 or float8_e4m3fn, the latter times the
    scales; `table` int32[B, n]: the pages of every conversation, in their order."""

    keys: Tensor
    values: Tensor
    table: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    def places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Where token `at` int64[B] of every conversation lies: its page, and its place there."""
        tokens = self.keys.shape[2]
        return self.table.gather(1, (at // tokens)[:, None])[:, 0].long(), at % tokens


def append(pages: Pages, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Write keys and values float [B, kv heads, dim] of one more token of every conversation, whose lengths before are
    int64[B]; rounded to nearest, and for FP8 cut off at 448 times the scale. Raises IndexError for a full table."""
    if not len(lengths):
        return
    _check(pages, lengths + 1)
    page, place = pages.places(lengths)
    for room, new, scale in ((pages.keys, keys, pages.key_scale), (pages.values, values, pages.value_scale)):
        if room.dtype == torch.float8_e4m3fn:
            codes = (new / scale).clamp(-LARGEST, LARGEST).to(room.dtype)
            room.view(torch.uint8)[page, :, place] = codes.view(torch.uint8)
        else:
            room[page, :, place] = new.to(room.dtype)


def attend(library: Library, q: Tensor, pages: Pages, lengths: Tensor, threads: int = 1) -> Tensor:
    """softmax(q k / sqrt(dim)) v over each conversation's first `lengths` int64[B] tokens, 0 where there are none: q
    float [B, heads, dim] -> float32 [B, heads, dim].

    Raises IndexError for lengths beyond the table and pages that are not there, ValueError for shapes that do not fit,
    a dim that is no multiple of 16 and dtypes that have no kernel.
    """
    if not len(q):
        return q.detach().float()
    _check(pages, lengths)
    heads, dim = q.shape[1:]
    if not len(q) == len(lengths) == len(pages.table) or heads % pages.keys.shape[1] or dim != pages.keys.shape[3]:
        shapes = ", ".join(str(list(part.shape)) for part in (q, pages.keys, pages.table, lengths))
        raise ValueError(f"q, keys, table and lengths that do not fit each other: {shapes}")
    if dim % TILE or pages.keys.dtype not in DTYPES or pages.values.dtype != pages.keys.dtype:
        raise ValueError(f"keys in float32, bf16 or FP8 of a width that {TILE} divides; got {dim}, {pages.keys.dtype}")
    q, lengths, table = q.detach().float().contiguous(), lengths.long().contiguous(), pages.table.int().contiguous()
    y = torch.empty_like(q)
    record = native.Pages(
        keys=pointer(pages.keys),
        values=pointer(pages.values),
        table=pointer(table),
        stride=table.shape[1],
        tokens=pages.keys.shape[2],
        key_scale=pages.key_scale,
        value_scale=pages.value_scale,
        kind=KINDS[pages.keys.dtype],
        heads=heads,
        kv_heads=pages.keys.shape[1],
        dim=dim,
    )
    if library.attend(ctypes.byref(record), pointer(q), pointer(lengths), len(q), pointer(y), threads):
        raise MemoryError(f"no memory for {len(q)} conversations of up to {int(lengths.max())} tokens")
    return y


def attend_plain(q: Tensor, pages: Pages, lengths: Tensor) -> Tensor:
    """What `attend` computes, in PyTorch and the dtype of q."""
    if not len(q):
        return q
    _check(pages, lengths)
    found = []
    for row, table, length in zip(q, pages.table.long(), lengths.tolist(), strict=True):
        keys, values = (
            part[table].to(q.dtype).transpose(0, 1).flatten(1, 2)[:, :length] * scale
            for part, scale in ((pages.keys, pages.key_scale), (pages.values, pages.value_scale))
        )
        queries = row.unflatten(0, (len(keys), -1))
        scores = (queries @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        found.append((scores @ values).flatten(0, 1))
    return torch.stack(found)


def _check(pages: Pages, lengths: Tensor) -> None:
    room = pages.table.shape[1] * pages.keys.shape[2]
    if not 0 <= int(lengths.min()) <= int(lengths.max()) <= room:
        raise IndexError(f"a table of {room} tokens a conversation, and lengths of {lengths.tolist()}")
    if not 0 <= int(pages.table.min()) <= int(pages.table.max()) < len(pages.keys):
        raise IndexError(
            f"{len(pages.keys)} pages, and a table of {int(pages.table.min())} to {int(pages.table.max())}"
        )
