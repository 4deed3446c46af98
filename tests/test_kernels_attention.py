"""Attention over pages in C against float64, in every tier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_native import tiers

from palaestra.kernels.attention import Pages, append, attend, attend_plain
from palaestra.kernels.native import FILE, Library

DTYPES = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float8_e4m3fn: 2.0**-4}
"""And the most that rounding to them is off."""


def filled(lengths, kv_heads, dim, tokens, dtype, generator):
    """Keys and values of conversations, appended token by token to pages in a random order, among pages of NaN."""
    table = -(-(max(lengths) + 1) // tokens)
    count = len(lengths) * table + 2
    order = torch.randperm(count, generator=generator)[: len(lengths) * table].view(len(lengths), -1).int()
    shape = count, kv_heads, tokens, dim
    keys, values = (torch.full(shape, torch.nan).to(dtype) for _ in range(2))
    scales = (0.5, 0.25) if dtype == torch.float8_e4m3fn else (1.0, 1.0)
    pages = Pages(keys, values, order, *scales)
    exact = torch.randn(2, len(lengths), max(lengths), kv_heads, dim, generator=generator)
    for at in range(max(lengths)):
        rows = torch.tensor([i for i, length in enumerate(lengths) if at < length])
        some = Pages(keys, values, order[rows], *scales)
        append(some, *exact[:, rows, at], torch.full((len(rows),), at))
    return pages, exact


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([16, 48]),
    tokens=st.sampled_from([1, 4, 16, 64]),
    dtype=st.sampled_from(list(DTYPES)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_attention_over_pages_is_that_of_float64(lengths, kv_heads, group, dim, tokens, dtype, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    pages, exact = filled(lengths, kv_heads, dim, tokens, dtype, generator)
    q, at = torch.randn(len(lengths), kv_heads * group, dim, generator=generator), torch.tensor(lengths)
    expected = attend_plain(q.double(), pages, at)
    for i, length in enumerate(lengths):  # the plain one against torch's own, on what was appended
        keys, values = (part[i, :length].transpose(0, 1)[None].double() for part in exact)
        own = torch.nn.functional.scaled_dot_product_attention(
            q[i, :, None][None].double(), keys, values, enable_gqa=True
        )
        assert (own[0, :, 0] - expected[i]).abs().max() <= 1e-9 + 12 * DTYPES[dtype]
    for name in tiers():
        found = attend(Library(FILE, name), q, pages, at, threads)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(
            attend(
                Library(FILE, name),
                q[:1],
                Pages(pages.keys, pages.values, pages.table[:1], pages.key_scale, pages.value_scale),
                at[:1],
            ),
            found[:1],
        )


def test_what_does_not_fit_is_refused():
    of, pages = (
        Library(FILE, None),
        Pages(torch.zeros(3, 1, 4, 16), torch.zeros(3, 1, 4, 16), torch.tensor([[2, 0]]).int()),
    )
    q = torch.zeros(1, 2, 16)
    with pytest.raises(IndexError, match=r"a table of 8 tokens a conversation, and lengths of \[9\]"):
        attend(of, q, pages, torch.tensor([9]))
    with pytest.raises(IndexError, match=r"lengths of \[-1\]"):
        attend(of, q, pages, torch.tensor([-1]))
    assert not attend(of, q + torch.nan, pages, torch.tensor([0])).any()
    with pytest.raises(IndexError, match=r"lengths of \[9\]"):
        append(pages, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.tensor([8]))
    with pytest.raises(IndexError, match="3 pages, and a table of 1 to 3"):
        attend(of, q, Pages(pages.keys, pages.values, torch.tensor([[3, 1]]).int()), torch.tensor([2]))
    half = Pages(pages.keys.half(), pages.values.half(), pages.table)
    with pytest.raises(ValueError, match=r"got 16, torch.float16"):
        attend(of, q, half, torch.tensor([2]))


def test_fp8_is_cut_off_at_its_largest():
    pages = Pages(
        *(torch.zeros(1, 1, 4, 16).to(torch.float8_e4m3fn) for _ in range(2)), torch.zeros(1, 1).int(), 1.0, 0.5
    )
    append(pages, torch.full((1, 1, 16), -1e6), torch.full((1, 1, 16), 1e6), torch.tensor([0]))
    assert attend_plain(torch.zeros(1, 1, 16), pages, torch.tensor([1])).unique().tolist() == [224.0]
    assert pages.keys.float().min() == -448


def test_many_conversations_an_empty_batch_and_tables_of_another_dtype():
    of, count = Library(FILE, None), 9000
    pages = Pages(torch.randn(3, 8, 4, 16), torch.randn(3, 8, 4, 16), torch.arange(count)[:, None] % 3)
    q, lengths = torch.randn(count, 8, 16), torch.arange(count).int() % 5
    found = attend(of, q, pages, lengths, threads=2)
    assert torch.equal(found[:40], attend(of, q[:40], Pages(pages.keys, pages.values, pages.table[:40]), lengths[:40]))
    torch.testing.assert_close(
        found[:40], attend_plain(q[:40], Pages(pages.keys, pages.values, pages.table[:40]), lengths[:40])
    )
    for nobody in (attend(of, q[:0], pages, lengths[:0]), attend_plain(q[:0], pages, lengths[:0])):
        assert nobody.shape == (0, 8, 16)
    before = pages.keys.clone()
    append(Pages(pages.keys, pages.values, pages.table[:0]), q[:0], q[:0], lengths[:0])
    assert torch.equal(pages.keys, before)
    with pytest.raises(ValueError, match="do not fit each other"):
        attend(of, q[:2], pages, lengths[:2])
