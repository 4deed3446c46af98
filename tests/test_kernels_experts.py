"""Router and experts in C against float64 and against the network's own, in every tier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_native import KINDS, tiers, values_of

from palaestra.kernels import nvfp4
from palaestra.kernels.experts import Routing, experts, experts_plain, pack_experts, route, route_plain
from palaestra.kernels.native import FILE, Library
from palaestra.model.config import ModelConfig
from palaestra.model.moe import Router

ROUTINGS = st.sampled_from(
    [
        Routing(top=2),
        Routing(top=3, normalise=False, factor=2.5),
        Routing(top=2, groups=4, top_groups=2),
        Routing(top=1, groups=2, top_groups=1, factor=0.5),
    ]
)


def gold(x, chosen, by, pairs):
    """float64[T, width]."""
    weights = torch.zeros(len(x), len(pairs)).scatter_(1, chosen, by)
    up, down = (torch.stack([values_of(pair[side]) for pair in pairs]) for side in (0, 1))
    hidden = torch.einsum("tw,eiw->tei", x.double(), up).relu().square()
    return torch.einsum("tei,ewi,te->tw", hidden, down, weights.double())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    count=st.sampled_from([8, 16]),
    width=st.sampled_from([16, 48]),
    inner=st.sampled_from([16, 80]),
    kind=st.sampled_from(sorted(KINDS)),
    routing=ROUTINGS,
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_experts_are_those_of_float64_alone_and_in_company(tokens, count, width, inner, kind, routing, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        tuple(KINDS[kind](torch.randn(shape, generator=generator)) for shape in ((inner, width), (width, inner)))
        for _ in range(count)
    ]
    x = torch.randn(tokens, width, generator=generator)
    chosen, by = route_plain(torch.randn(tokens, count, generator=generator), torch.zeros(count), routing)
    expected = gold(x, chosen, by, pairs)
    assert (experts_plain(x, chosen, by, pairs) - expected).norm() <= 1e-5 * expected.norm()
    for name in tiers():
        of = Library(FILE, name)
        packed = pack_experts(of, pairs)
        found = experts(of, x, chosen, by, packed, threads)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(experts(of, x[:1], chosen[:1], by[:1], packed), found[:1])


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 20), routing=ROUTINGS, bias=st.booleans(), seed=st.integers(0, 2**31))
def test_routes_are_those_of_float64_and_of_the_network(tokens, routing, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 16, generator=generator)
    correction = torch.rand(16, generator=generator) * bias
    expected, by = route_plain(logits.double(), correction.double(), routing)
    for name in tiers():
        chosen, weights = route(Library(FILE, name), logits, correction, routing)
        assert torch.equal(chosen, expected)
        torch.testing.assert_close(weights.double(), by)
    config = ModelConfig(
        hybrid_override_pattern="E",
        hidden_size=16,
        n_routed_experts=16,
        num_experts_per_tok=routing.top,
        n_group=routing.groups,
        topk_group=routing.top_groups,
        norm_topk_prob=routing.normalise,
        routed_scaling_factor=routing.factor,
    )
    router = Router(config).eval()
    router.weight.data, router.e_score_correction_bias = torch.eye(16), correction
    chosen, weights = router(logits)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights.double(), by)


def test_weights_of_0_are_nothing_and_what_does_not_fit_is_refused():
    of = Library(FILE, None)
    packed = pack_experts(of, [(nvfp4.quantize(torch.randn(32, 16)), nvfp4.quantize(torch.randn(16, 32)))] * 2)
    assert packed.nbytes == 4 * 32 * 16 * 9 // 16
    first = torch.zeros(3, 1).long()
    assert not experts(of, torch.full((3, 16), torch.nan), first, torch.zeros(3, 1), packed).any()
    assert experts(of, torch.zeros(0, 16), first[:0], torch.zeros(0, 1), packed).shape == (0, 16)
    with pytest.raises(ValueError, match=r"width 16; got x, chosen and weights of \[3, 32\], \[3, 1\], \[3, 1\]"):
        experts(of, torch.zeros(3, 32), first, torch.zeros(3, 1), packed)
    with pytest.raises(IndexError, match="2 experts; 2 to 2 were chosen"):
        experts(of, torch.zeros(3, 16), first + 2, torch.ones(3, 1), packed)
    with pytest.raises(ValueError, match=r"every expert needs an up of \[32, 16\] and a down of \[16, 32\]"):
        pack_experts(of, [(torch.zeros(32, 16), torch.zeros(16, 32)), (torch.zeros(48, 16), torch.zeros(16, 48))])
    with pytest.raises(ValueError, match="multiples of 16; got 16 and 24"):
        pack_experts(of, [(torch.zeros(24, 16), torch.zeros(16, 24))])
