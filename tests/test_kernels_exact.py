"""NVFP4 bit for bit: against its definition in rational numbers, and against what others make of the same weight."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest
import rational
import torch
from rational import E2M1, E4M3
from safetensors.torch import load_file

from palaestra.kernels.layouts import from_compressed, from_modelopt, to_compressed, to_modelopt
from palaestra.kernels.nvfp4 import NVFP4, Recipe, dequantize, quantize
from palaestra.kernels.nvfp4_plain import FOUR_OR_SIX_MAX

RECORDED = Path(__file__).parent / "fixtures" / "nvfp4.safetensors"
"""What ModelOpt 0.47.0, compressed-tensors 0.20.1 and torchao 0.18.0 made of one weight, each under the global scale
that it takes itself (`own`) and under a power of two (`power`): written by benchmarks/record_nvfp4.py."""
EDGES = (0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-126 - 2.0**-149, 1.0, -6.0, 2688.0, 1e30, -3.4028234e38)


def weight_of(seed: int) -> torch.Tensor:
    """A random float32[N, K] or bf16[N, K]: from subnormal to huge, with many ties, edge values and blocks of zeros."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weight = torch.randn(draw.randint(1, 3), 16 * draw.randint(1, 3), generator=generator)
    if draw.random() < 0.3:
        weight = (weight * 8).round() / 8
    weight *= torch.exp(draw.choice((0.0, 1.0, 6.0)) * torch.randn(len(weight), 1, generator=generator))
    weight *= 2.0 ** draw.choice((0, 0, 0, -10, 11, 100, -100, -130, -145))
    if draw.random() < 0.2:
        for _ in range(3):
            weight[draw.randrange(len(weight)), draw.randrange(weight.shape[1])] = draw.choice(EDGES)
    if draw.random() < 0.1:
        weight[0, :16] = 0
    return weight.clamp(-3e38, 3e38).bfloat16() if draw.random() < 0.2 else weight


def scale2_of(seed: int, weight: torch.Tensor) -> torch.Tensor | None:
    """A global scale to be given, of few bits and large enough; or none."""
    draw = random.Random(-seed)
    largest = float(weight.float().abs().max())
    if draw.random() < 0.5 or largest > 1e30:
        return None
    return torch.tensor(float(rational.global_scale(largest)) * draw.choice((1, 1.25, 1.5, 2, 64)))


def problem(weight: torch.Tensor, rule: str, given: torch.Tensor | None) -> str:
    """Where `quantize` and the definition part; empty where they agree."""
    ours = quantize(weight, Recipe(rule), given)
    scale2 = Fraction(ours.scale2.item())
    bound = int(FOUR_OR_SIX_MAX) if rule == "four-or-six" else 448
    expected = rational.global_scale(float(weight.float().abs().max()), bound) if given is None else given.item()
    if scale2 != expected:
        return f"the global scale is {float(scale2)}, not {float(expected)}"
    blocks = weight.float().unflatten(-1, (-1, 16)).flatten(0, 1).tolist()
    scales = ours.scales.view(torch.uint8).flatten().tolist()
    pairs = torch.stack([ours.codes & 15, ours.codes >> 4], -1).view(-1, 16).tolist()
    found = (block_problem(*parts, scale2, rule) for parts in zip(blocks, scales, pairs, strict=True))
    return next((why for why in found if why), "")


def block_problem(values: list[float], scale: int, codes: list[int], scale2: Fraction, rule: str) -> str:
    """The same of one block, by its scale's code and its values' codes."""
    largest = max(map(abs, values))
    candidates = rational.scales(largest, scale2, rule) if largest else [{rational.ONE}]
    if scale not in set.union(*candidates):
        return f"{values} have the scale {scale}, which is none of {candidates}"
    if codes != rational.codes(values, E4M3[scale] * scale2):
        return f"{values} have the codes {codes} under the scale {scale}"
    if len(candidates) == 1:
        return ""
    sure = [rational.error(values, E4M3[code] * scale2) for code, *others in candidates if not others]
    ours = rational.error(values, E4M3[scale] * scale2)
    return f"{values} have less error than under {scale}" if ours > min(sure) * Fraction(1 + 1e-5) else ""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("rule", "tensors"),
    [
        ("max", 150),
        ("four-or-six", 150),
        ("error", 50),
        pytest.param("max", 10_000, marks=pytest.mark.slow),
        pytest.param("four-or-six", 10_000, marks=pytest.mark.slow),
        pytest.param("error", 2500, marks=pytest.mark.slow),  # of twelve candidates a block
    ],
)
def test_quantisation_is_the_formats_definition_bit_for_bit(rule, tensors, record_property):
    for seed in range(tensors):
        weight = weight_of(seed)
        assert not problem(weight, rule, scale2_of(seed, weight)), f"seed {seed}"
    record_property("tensors", tensors)


@pytest.mark.parametrize("power", [-116, -3, 0, 90])
def test_every_code_under_every_scale_is_its_exact_product(power):
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(len(E4M3), 1)
    steps = torch.arange(len(E4M3), dtype=torch.uint8)[:, None].expand(-1, 32).contiguous()
    values = dequantize(NVFP4(bytes_, steps.view(torch.float8_e4m3fn), torch.tensor(2.0**power)))
    signed = [float(magnitude) for magnitude in E2M1] + [-float(magnitude) for magnitude in E2M1]
    for step, row in zip(E4M3, values.tolist(), strict=True):
        scale = float(step) * 2.0**power
        assert row[0::2] == [signed[byte & 15] * scale for byte in range(256)]
        assert row[1::2] == [signed[byte >> 4] * scale for byte in range(256)]


BAD = {
    "an infinity": (torch.full((2, 32), -torch.inf), r"infinities or NaN; the weight \[2, 32\]"),
    "one NaN": (torch.zeros(3, 16).index_fill(0, torch.tensor([2]), torch.nan), r"infinities or NaN"),
    "NaN in bf16": (torch.full((1, 16), torch.nan, dtype=torch.bfloat16), r"infinities or NaN"),
    "15 columns": (torch.zeros(2, 15), r"K a multiple of 16; got \[2, 15\]"),
    "40 columns": (torch.zeros(16, 40), r"K a multiple of 16; got \[16, 40\]"),
    "a vector": (torch.zeros(16), r"needs \[\.\.\., N, K\]"),
    "no columns": (torch.zeros(2, 0), r"needs \[\.\.\., N, K\]"),
    "no rows": (torch.zeros(0, 16), r"needs \[\.\.\., N, K\]"),
}


@pytest.mark.parametrize("rule", ["max", "error", "four-or-six"])
@pytest.mark.parametrize("name", BAD)
def test_what_nvfp4_cannot_hold_is_refused(name, rule):
    weight, words = BAD[name]
    with pytest.raises(ValueError, match=f"NVFP4 .*{words}"):
        quantize(weight, Recipe(rule))


# -- what others make of the same weight


def recorded() -> tuple[torch.Tensor, dict[str, NVFP4], dict[str, torch.Tensor]]:
    """The weight; what each maker makes of it, by name; and what some of them dequantise that to."""
    tensors = load_file(RECORDED)
    made = {
        name.removesuffix(part): read(name.removesuffix(part), tensors)
        for part, read in (("_scale_2", from_modelopt), ("_packed", from_compressed))
        for name in tensors
        if name.endswith(part)
    }
    suffix = ".dequantised"
    values = {name.removesuffix(suffix): tensors[name] for name in tensors if name.endswith(suffix)}
    return tensors["input"], made, values


WEIGHT, MADE, VALUES = recorded()


@pytest.mark.parametrize("name", MADE)
def test_others_make_the_same_codes_and_scales_at_the_same_global_scale(name):
    theirs = MADE[name]
    weight = WEIGHT[: len(theirs.codes)]  # torchao's lacks the last rows, whose scales are subnormal
    ours = quantize(weight, scale2=theirs.scale2)
    assert torch.equal(ours.codes, theirs.codes)
    zero = weight.unflatten(-1, (-1, 16)).abs().amax(-1) == 0  # of which everyone has another scale
    assert zero.sum() == 1
    assert torch.equal(ours.scales.float()[~zero], theirs.scales.float()[~zero])


@pytest.mark.parametrize("name", VALUES)
def test_both_layouts_are_dequantised_as_by_their_makers(name):
    assert torch.equal(dequantize(MADE[name]).to(VALUES[name].dtype), VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_both_layouts_are_written_as_by_their_makers(name):
    tensors = load_file(RECORDED)
    codes, scales, scale2 = (to_compressed if name.startswith("compressed") else to_modelopt)(name, MADE[name]).items()
    for part, tensor in (codes, scales):
        assert tensor.dtype == tensors[part].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[part].view(torch.uint8)), part
    torch.testing.assert_close(scale2[1], tensors[scale2[0]], rtol=2.0**-23, atol=0)  # a reciprocal's reciprocal
