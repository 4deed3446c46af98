"""Quantisation, its layouts and the Hadamard transform against exact arithmetic and definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import rational
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import E2M1, E4M3, nearest

from palaestra.kernels import fp8, hadamard
from palaestra.kernels.layouts import from_compressed, from_modelopt, to_compressed, to_modelopt
from palaestra.kernels.nvfp4 import NVFP4, Recipe, dequantize, fake_quantize, quantize, requantize

DRAWS = 100_000


@pytest.mark.parametrize("exponent", [-40, -1, 0, 1, 30])
def test_the_global_scale_turns_at_exact_powers_of_two(exponent):
    edge = torch.full((1, 16), 2688.0 * 2.0**exponent)
    assert quantize(edge).scale2.item() == 2.0**exponent
    assert quantize(torch.nextafter(edge, torch.tensor(math.inf))).scale2.item() == 2.0 ** (exponent + 1)
    assert quantize(torch.nextafter(edge, torch.tensor(0.0))).scale2.item() == 2.0**exponent


def test_the_even_index_is_in_the_low_nibble_and_the_sign_in_its_top_bit():
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([6.0, -0.5, 1.0, -6.0]) * 448
    quantised = quantize(weight)
    assert quantised.codes[0, :2].tolist() == [7 | 9 << 4, 2 | 15 << 4]
    assert (quantised.codes.shape, quantised.scales.shape) == ((1, 8), (1, 1))


def test_each_matrix_of_a_stack_is_quantised_on_its_own():
    stack = torch.randn(3, 4, 32) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    whole = quantize(stack)
    assert whole.scale2.shape == (3,)
    for index, matrix in enumerate(stack):
        one = quantize(matrix)
        assert torch.equal(dequantize(one), dequantize(NVFP4(*(part[index] for part in whole))))


def test_the_gradient_passes_straight_through():
    weight = torch.randn(4, 32, requires_grad=True)
    upstream = torch.randn(4, 32)
    fake_quantize(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_zeros_stay_zero():
    quantised = quantize(torch.zeros(2, 32))
    assert quantised.scales.float().unique().tolist() == [1.0]
    assert quantised.scale2.item() == 1.0
    assert not dequantize(quantised).any()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-34])
def test_values_near_the_end_of_the_range_are_still_bf16_numbers(size):
    values = dequantize(quantize(torch.randn(4, 32) * size))
    assert torch.equal(values, values.bfloat16().float())


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4), blocks=st.integers(1, 3), scale=st.sampled_from([1e-30, 1e-3, 1.0, 7.0, 1e20]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_nvfp4_values_are_bf16_numbers_and_codes_agree_with_fake_quantisation(rows, blocks, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, rows, 16 * blocks, generator=generator) * scale
    weight[0, 0, :16] = 0
    values = dequantize(quantize(weight))
    assert torch.equal(values, values.bfloat16().float())
    assert torch.equal(values, fake_quantize(weight))
    assert torch.equal(values[0, 0, :16], torch.zeros(16))
    amax = weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    floor = 2.0**-9 * quantize(weight).scale2[:, None, None, None]
    error = (values - weight).unflatten(-1, (-1, 16)).abs()
    assert bool((error <= torch.maximum(amax * (1 / 6 + 1 / 16), floor * 3)).all())


def test_nvfp4_rounds_ties_to_even_codes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, 0.26, 0.24, 5.1, 4.9, 0.0, 6.0])
    weight = torch.stack([ties, torch.full((16,), 6.0)])
    quantised = quantize(weight * 448)
    assert quantised.scale2.item() == 1.0
    expected = [0, 1, 1, 2, 2, 4, 4, 6, 0, -2, 0.5, 0, 6, 4, 0, 6]
    assert (dequantize(quantised)[0] / 448).tolist() == expected


# -- other recipes


@settings(max_examples=20, deadline=None)
@given(rule=st.sampled_from(["error", "four-or-six"]), seed=st.integers(0, 9999))
def test_the_scale_of_a_square_has_the_least_error_of_its_candidates(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 32, generator=generator) * torch.exp(torch.randn(16, 1, generator=generator))
    quantised = quantize(weight, Recipe(rule, square=True))
    scale2 = Fraction(quantised.scale2.item())
    for values, scales in zip(weight.split(16, 1), quantised.scales.float().T, strict=True):
        (scale,) = set(scales.tolist())
        square = values.flatten().tolist()
        candidates = rational.scales(max(map(abs, square)), scale2, rule)
        assert scale in {float(E4M3[code]) for found in candidates for code in found}
        errors = [rational.error(square, E4M3[code] * scale2) for code, *others in candidates if not others]
        assert rational.error(square, Fraction(scale) * scale2) <= min(errors) * Fraction(1 + 1e-5)


def test_less_error_is_really_less():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    of = {
        rule: (dequantize(quantize(weight, Recipe(rule))) - weight).square().mean()
        for rule in ("max", "four-or-six", "error")
    }
    assert of["error"] < of["four-or-six"] < of["max"]


@pytest.mark.parametrize("rule", ["max", "four-or-six", "error"])
def test_square_blocks_quantise_a_matrix_and_its_transpose_alike(rule):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    there = dequantize(quantize(weight, Recipe(rule, square=True)))
    assert torch.equal(there, dequantize(quantize(weight.T, Recipe(rule, square=True))).T)
    assert torch.equal(there, there.bfloat16().float())
    with pytest.raises(ValueError, match="N a multiple of 16"):
        quantize(weight[:20], Recipe(square=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", range(7))
def test_stochastic_rounding_is_unbiased_between_a_code_and_the_next(code, sign):
    low, high = float(E2M1[code]), float(E2M1[code + 1])
    shares = torch.tensor([0.0, 0.001, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.999, 1.0])
    weight = torch.full((1, 16), 6.0)  # so that the block has the scale 1
    weight[0, : len(shares)] = sign * (low + (high - low) * shares)
    recipe = Recipe(generator=torch.Generator().manual_seed(code))
    drawn = dequantize(quantize(weight.repeat(DRAWS, 1), recipe, scale2=torch.tensor(1.0)))[:, : len(shares)]
    assert torch.isin(drawn, sign * torch.tensor([low, high])).all()
    assert torch.equal(drawn[:, [0, -1]], weight[:, [0, len(shares) - 1]].expand(DRAWS, -1))
    standard_error = (high - low) * (shares * (1 - shares) / DRAWS).double().sqrt()
    assert ((drawn.double().mean(0) - weight[0, : len(shares)]).abs() <= 4 * standard_error + 1e-9).all()


def test_stochastic_rounding_cuts_nothing_off():
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    mean = torch.stack([dequantize(quantize(weight, Recipe(generator=generator))) for _ in range(400)]).mean(0)
    assert (mean - weight).abs().max() < 0.15
    assert abs(((mean - weight) * weight.sign()).mean()) < 1e-3
    with pytest.raises(ValueError, match="unbiased only under the rule 'max'"):
        quantize(weight, Recipe("error", generator=generator))


def test_rows_that_changed_are_quantised_alone_under_the_same_global_scale():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    weight[0, 0] = 50.0
    quantised = quantize(weight)
    weight[[2, 5]] = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    requantize(quantised, torch.tensor([2, 5]), weight[[2, 5]])
    fresh = quantize(weight)
    assert torch.equal(quantised.codes, fresh.codes)
    assert torch.equal(quantised.scales.float(), fresh.scales.float())
    with pytest.raises(ValueError, match="do not fit"):
        requantize(quantised, torch.tensor([1]), torch.full((1, 32), 1e4))


def test_a_global_scale_that_is_given_may_be_any_number():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    scale2 = weight.abs().max() / 2688
    values = dequantize(quantize(weight, scale2=scale2))
    assert (values - weight).norm() / weight.norm() < 0.12
    assert values.abs().max() == pytest.approx(weight.abs().max().item(), rel=1e-6)


# -- layouts


def same(one: NVFP4, other: NVFP4) -> bool:
    """Bit for bit."""
    codes = torch.equal(one.codes, other.codes)
    scales = torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))
    return codes and scales and torch.equal(one.scale2, other.scale2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), power=st.booleans())
def test_both_layouts_give_back_every_bit_of_ours(seed, power):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 48, generator=generator)
    divisor = 2688 / weight.abs().max()  # as compressed-tensors chooses it
    quantised = quantize(weight, scale2=None if power else 1 / divisor)
    assert same(from_modelopt("x.weight", to_modelopt("x.weight", quantised)), quantised)
    packed = to_compressed("x.weight", quantised)
    assert list(packed) == ["x.weight_packed", "x.weight_scale", "x.weight_global_scale"]
    assert same(from_compressed("x.weight", packed), quantised)
    again = to_compressed(
        "x.weight", from_compressed("x.weight", {**packed, "x.weight_global_scale": divisor.reshape(1)})
    )
    torch.testing.assert_close(again["x.weight_global_scale"][0], divisor, rtol=2.0**-22, atol=0)


def test_a_layout_that_lacks_a_part_names_it():
    stored = to_modelopt("x.weight", quantize(torch.randn(2, 16)))
    del stored["x.weight_scale"]
    with pytest.raises(KeyError, match=r"x\.weight_scale"):
        from_modelopt("x.weight", stored)


# -- FP8


@settings(max_examples=50, deadline=None)
@given(size=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), seed=st.integers(0, 9999))
def test_fp8_is_the_nearest_e4m3_number_under_its_scale(size, seed):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)) * size
    quantised = fp8.quantize(weight)
    scale = Fraction(quantised.scale.item())
    assert quantised.values.float().abs().max() == 448
    for value, got in zip(weight.flatten().tolist(), quantised.values.flatten().tolist(), strict=True):
        ratio = Fraction(torch.tensor(value).div(quantised.scale).item())
        assert abs(Fraction(got)) == E4M3[nearest(min(abs(ratio), Fraction(448)), E4M3)]
    assert (fp8.dequantize(quantised) - weight).abs().max() <= float(scale) * 16
    x = torch.randn(2, 7)
    torch.testing.assert_close(fp8.linear(x, quantised), x @ fp8.dequantize(quantised).T)


def test_fp8_of_zeros_is_zeros_and_of_infinities_refused():
    assert fp8.quantize(torch.zeros(4)).scale == 1
    with pytest.raises(ValueError, match="infinities or NaN"):
        fp8.quantize(torch.tensor([1.0, math.inf]))


# -- the Hadamard transform


@pytest.mark.parametrize("size", hadamard.SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_hadamard_transform_is_orthonormal_and_undone_by_its_inverse(size, seed):
    square = hadamard.matrix(size, seed).double()
    torch.testing.assert_close(square @ square.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert square.abs().unique().numel() == 1
    x = torch.randn(3, 5, 2 * size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(hadamard.inverse(hadamard.transform(x, size, seed), size, seed), x)
    w = torch.randn(4, 2 * size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        hadamard.transform(x, size, seed) @ hadamard.transform(w, size, seed).T, x @ w.T, rtol=1e-4, atol=1e-4
    )


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 32)
    x[0, 3] = 16.0
    spread = hadamard.transform(x)
    assert torch.equal(spread[0, :16].abs(), torch.full((16,), 4.0))
    assert not spread[0, 16:].any()


@pytest.mark.parametrize(("size", "width", "words"), [(24, 48, "has the sizes"), (32, 48, "K a multiple of it")])
def test_a_size_that_does_not_fit_is_named(size, width, words):
    with pytest.raises(ValueError, match=words):
        hadamard.transform(torch.zeros(2, width), size)
