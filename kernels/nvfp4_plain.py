"""The NVFP4 format, and in plain PyTorch what nvfp4.py computes.

E2M1 codes, blocks of 16 along the last dimension, E4M3 block scales, one global scale a matrix.

The global scale is a power of two, 2^ceil(log2(amax / 2688)): a code (2 significant bits) times an E4M3 scale (4) has
at most 6, so that every dequantised weight is exactly a bf16 number. Source of the format: NVIDIA's NVFP4 (arXiv
2509.25149) and ModelOpt's checkpoint layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from palaestra.kernels import hadamard

BLOCK = 16
CODE_MAX = 6.0
SCALE_MIN, SCALE_MAX = 2.0**-9, 448.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NEAR = tuple(2.0 ** (eighth / 8) for eighth in range(-4, 8))
"""The multiples of amax / 6 among which the scale of the least squared error is looked for."""
FOUR_OR_SIX_MAX = 256.0
"""The largest scale where a block's top value may be 4 as well: 1.5 times it is still an E4M3 number."""

ROUNDED = 1 + 2.0**-20
"""How far a global scale that others computed from the same weight may be off."""

Rule = Literal["max", "error", "four-or-six"]
"""How a block's scale is chosen: its largest magnitude becomes 6; or so that the squared error is the least; or its
largest magnitude becomes 4 or 6, whichever gives the less squared error (Four Over Six, arXiv 2512.02010)."""


MULTIPLES: dict[Rule, tuple[float, ...]] = {"max": (1.0,), "error": NEAR, "four-or-six": (1.0, 1.5)}
"""Of amax / 6, by rule, among which a block's scale is that of the least squared error."""


class NVFP4(NamedTuple):
    """A quantised matrix, or a stack of them.

    codes: uint8[..., K/2], two codes a byte, the even index in the low nibble (sign << 3 | magnitude index);
    scales: float8_e4m3fn[..., K/16]; scale2: float32[...], the global scale of each [N, K] matrix of the stack.
    """

    codes: Tensor
    scales: Tensor
    scale2: Tensor


class Recipe(NamedTuple):
    """How weights are quantised. `square`: one scale for 16 x 16 of them, so that a matrix and its transpose have the
    same values; `generator`: round stochastically, unbiased, by draws that a seed taken from it makes (None: to nearest
    even); `hadamard`: the size of the random Hadamard transform that comes first (0: none), `signs` the seed of its
    signs."""

    rule: Rule = "max"
    square: bool = False
    generator: torch.Generator | None = None
    hadamard: int = 0
    signs: int = 0


PLAIN = Recipe()
"""To nearest even, a block's largest magnitude becoming 6."""


def quantize(weight: Tensor, recipe: Recipe = PLAIN, scale2: Tensor | None = None) -> NVFP4:
    """What `quantize` computes."""
    values, scales, scale2 = _parts(weight, recipe, scale2)
    magnitudes = torch.tensor(MAGNITUDES, device=weight.device)
    codes = torch.bucketize(values.abs(), magnitudes).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    codes = codes.flatten(-2)
    return NVFP4(codes[..., 0::2] | (codes[..., 1::2] << 4), scales, scale2[..., 0, 0].clone())


def dequantize(quantised: NVFP4) -> Tensor:
    """What `dequantize` computes."""
    magnitudes = torch.tensor(MAGNITUDES, device=quantised.codes.device)
    table = torch.cat([magnitudes, -magnitudes])
    pairs = torch.stack([quantised.codes & 15, quantised.codes >> 4], dim=-1).flatten(-2)
    values = table[pairs.long()].unflatten(-1, (-1, BLOCK))
    result: Tensor = (values * (quantised.scales.float() * quantised.scale2[..., None, None]).unsqueeze(-1)).flatten(-2)
    return result


def fake_quantize(weight: Tensor, recipe: Recipe = PLAIN) -> Tensor:
    """The values that `fake_quantize` computes."""
    values, scales, scale2 = _parts(weight, recipe)
    return (values * (scales.float() * scale2).unsqueeze(-1)).flatten(-2)


def _parts(weight: Tensor, recipe: Recipe, scale2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Signed E2M1 values float32[..., K/16, 16], E4M3 block scales [..., K/16], global scale float32[..., 1, 1]."""
    check(weight, recipe)
    blocks, amax = _blocks(weight, recipe)
    if recipe.square:
        amax = over_squares(amax, torch.amax)
    scale2 = global_scale(amax, bound(recipe)) if scale2 is None else _fitting(scale2, amax)
    scales = _scales(blocks, amax / (CODE_MAX * scale2), scale2, recipe)
    scales = torch.where(amax > 0, scales, torch.ones_like(scales))
    ratio = blocks / (scales.float() * scale2).unsqueeze(-1)
    return _round(ratio.abs(), recipe.generator).copysign_(ratio), scales, scale2


def _blocks(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """float32[..., N, K/16, 16] and each block's largest magnitude."""
    values = weight.float()
    if recipe.hadamard:
        values = hadamard.transform_plain(values, recipe.hadamard, recipe.signs)
    blocks = values.contiguous().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    if not torch.isfinite(amax).all():
        raise not_finite(weight)
    return blocks, amax


def over_squares(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Each 16 rows of float32[..., N, K/16] reduced, for all 16."""
    squares = values.unflatten(-2, (-1, BLOCK))
    reduced: Tensor = reduce(squares, dim=-2, keepdim=True)
    return reduced.expand_as(squares).flatten(-3, -2)


def global_scale(amax: Tensor, bound: float) -> Tensor:
    """Block maxima float32[..., N, K/16] -> float32[..., 1, 1]: 2^ceil(log2(amax / 6 / bound)), the smallest power of
    two under which no block scale exceeds `bound`; 1 for a zero matrix; not below 2^-116: bf16 would lose bits."""
    amax = amax.amax(dim=(-2, -1), keepdim=True)
    mantissa, exponent = torch.frexp((amax / (CODE_MAX * bound)).clamp(min=2.0**-116))
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def _fitting(scale2: Tensor, amax: Tensor) -> Tensor:
    scale2 = scale2.float().expand(amax.shape[:-2])[..., None, None]
    if (amax > CODE_MAX * SCALE_MAX * scale2 * ROUNDED).any():
        raise no_fit(scale2, amax)
    return scale2


def bound(recipe: Recipe) -> float:
    """The largest block scale by which the global scale is found."""
    return FOUR_OR_SIX_MAX if recipe.rule == "four-or-six" else SCALE_MAX


def _scales(blocks: Tensor, ideal: Tensor, scale2: Tensor, recipe: Recipe) -> Tensor:
    """The blocks' E4M3 scales by the rule; `ideal` float32[..., N, K/16]: under which the largest magnitude is 6."""
    if recipe.generator is not None:
        return _e4m3_above(ideal)  # nothing may be cut off at 6
    candidates = (_e4m3(ideal * multiple) for multiple in MULTIPLES[recipe.rule])
    if recipe.rule == "max":
        return next(candidates)
    return _least_error(blocks / scale2.unsqueeze(-1), candidates, recipe)


def _least_error(blocks: Tensor, candidates: Iterable[Tensor], recipe: Recipe) -> Tensor:
    """Of the candidates that of the least squared error, the earlier of equals."""
    best = least = None
    for scales in candidates:
        steps = scales.float().unsqueeze(-1)
        error = _sum((_round((blocks / steps).abs()).mul_(steps) - blocks.abs()).square(), -1)
        if recipe.square:
            error = over_squares(error, _sum)
        if best is None or least is None:
            best, least = scales, error
            continue
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    assert best is not None
    return best


def _sum(values: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Of sixteen, neighbours first: in C too, so that among nearly equal errors both find the same the least."""
    values = values.movedim(dim, -1)
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values.movedim(-1, dim) if keepdim else values[..., 0]


def _e4m3(scales: Tensor) -> Tensor:
    return scales.clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)


def _e4m3_above(scales: Tensor) -> Tensor:
    """The smallest E4M3 number that is not below, or the largest: a given global scale may be a bit too small."""
    nearest = _e4m3(scales)
    code = nearest.view(torch.uint8) + (nearest.float() < scales.clamp(max=SCALE_MAX)).to(torch.uint8)
    return code.view(torch.float8_e4m3fn)


def _round(magnitude: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The nearest E2M1 magnitude, ties to the even code; with a generator one of the two nearest, so that the mean is
    the magnitude itself. The steps are 0.5 below 2, 1 below 4, 2 above: half of the power of two in the exponent."""
    step = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5).clamp_(0.5, 2.0)
    steps = magnitude / step
    if generator is None:
        return steps.round_().mul_(step).clamp_(max=CODE_MAX)
    below = steps.floor()
    drawn = torch.rand(steps.shape, generator=generator, device=steps.device)
    return (below + (drawn < steps - below)).mul_(step).clamp_(max=CODE_MAX)


def check(weight: Tensor, recipe: Recipe) -> None:
    if weight.dim() < 2 or not weight.numel() or weight.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs [..., N, K] with K a multiple of {BLOCK}; got {list(weight.shape)}")
    if recipe.square and weight.shape[-2] % BLOCK:
        raise ValueError(f"square blocks need N a multiple of {BLOCK}; got {list(weight.shape)}")
    if recipe.generator is not None and recipe.rule != "max":
        raise ValueError(f"stochastic rounding is unbiased only under the rule 'max', not {recipe.rule!r}")
    if recipe.hadamard:
        hadamard.check(weight, recipe.hadamard)


def not_finite(weight: Tensor) -> ValueError:
    return ValueError(f"NVFP4 cannot hold infinities or NaN; the weight {list(weight.shape)} has some")


def no_fit(scale2: Tensor, amax: Tensor) -> ValueError:
    return ValueError(f"under the global scale {scale2.flatten().tolist()} values up to {amax.max():g} do not fit")
