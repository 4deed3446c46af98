"""Each operation's one function: what it picks, and that all of them compute the same."""

from __future__ import annotations

import pytest
import torch

from palaestra.kernels import attention, dispatch, fp8, linear, nvfp4
from palaestra.kernels.attention import Pages
from palaestra.kernels.experts import Routing, experts_plain, route_plain
from palaestra.kernels.native import TORCH, library

TIER = library().tier


@pytest.fixture(params=[TIER, TORCH])
def kernels(request, monkeypatch):
    if request.param == TORCH:
        monkeypatch.setattr(dispatch, "library", lambda: None)
    assert dispatch.kernels_for(torch.device("cpu")) == request.param
    return request.param


@pytest.mark.parametrize("make", [nvfp4.quantize, fp8.quantize, torch.Tensor.bfloat16])
def test_linear(kernels, make):
    weight, x = make(torch.randn(40, 32)), torch.randn(2, 3, 32).bfloat16()
    prepared = dispatch.linear(weight)
    assert prepared.kernels == kernels
    assert prepared(x).dtype == torch.bfloat16
    torch.testing.assert_close(prepared(x.float()), linear.linear_plain(x, weight), rtol=1e-5, atol=1e-5)


def test_experts_and_their_choice(kernels):
    up, down = nvfp4.quantize(torch.randn(8, 48, 16)), nvfp4.quantize(torch.randn(8, 16, 48))
    routing, logits, bias = Routing(top=3, groups=4, top_groups=2), torch.randn(5, 8), torch.rand(8)
    chosen, weights = dispatch.route(logits, bias, routing)
    assert torch.equal(chosen, route_plain(logits, bias, routing)[0])
    prepared, x = dispatch.experts(up, down), torch.randn(5, 16)
    assert prepared.kernels == kernels
    pairs = [(nvfp4.NVFP4(*(part[i] for part in up)), nvfp4.NVFP4(*(part[i] for part in down))) for i in range(8)]
    expected = experts_plain(x, chosen, weights, pairs)
    torch.testing.assert_close(prepared(x, chosen, weights), expected, rtol=1e-4, atol=1e-4)


def test_attention(kernels):
    pages = Pages(torch.randn(4, 2, 8, 16), torch.randn(4, 2, 8, 16), torch.tensor([[3, 0], [1, 2]]).int())
    q, lengths = torch.randn(2, 4, 16).bfloat16(), torch.tensor([11, 3])
    found = dispatch.attend(q, pages, lengths)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attention.attend_plain(q.float(), pages, lengths), rtol=2e-2, atol=2e-2)
