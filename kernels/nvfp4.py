"""Quantising to NVFP4 and back.

What everybody calls is registered with torch as `palaestra::nvfp4_*`: on the CPU it runs in C where that was built
(cpu/quantize.h), elsewhere as in nvfp4_plain.py, where the format is. Both give the same bits, but for the draws of
stochastic rounding.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from palaestra.kernels import hadamard
from palaestra.kernels import nvfp4_plain as plain
from palaestra.kernels.native import NO_FIT, NOT_FINITE, Library, Quantising, Rotation, library, pointer
from palaestra.kernels.nvfp4_plain import BLOCK, NVFP4, PLAIN, Recipe, Rule
from palaestra.kernels.registered import differentiate, register

__all__ = ["BLOCK", "NVFP4", "PLAIN", "Recipe", "dequantize", "fake_quantize", "quantize", "requantize", "transpose"]


def quantize(weight: Tensor, recipe: Recipe = PLAIN, scale2: Tensor | None = None) -> NVFP4:
    """Quantise float [..., N, K]; `scale2` float32[...]: a global scale that is given, of any value.

    Raises ValueError for K not a multiple of 16 (or of the Hadamard transform's size), nor N where blocks are square,
    infinities or NaN, stochastic rounding under another rule than `max`, and a `scale2` under which values do not fit.
    """
    return NVFP4(*quantize_op(weight.detach(), *_flat(recipe), scale2))


def requantize(quantised: NVFP4, rows: Tensor, weight: Tensor) -> None:
    """Quantise only the rows that changed, in place and under the same global scale: `rows` int64[R] of one matrix, and
    what they are now, float [R, K]. Raises ValueError as quantize."""
    codes, scales, _ = quantize(weight, scale2=quantised.scale2)
    quantised.codes[rows] = codes
    quantised.scales.view(torch.uint8)[rows] = scales.view(torch.uint8)


def dequantize(quantised: NVFP4) -> Tensor:
    """float32[..., N, K], every value exactly representable in bf16 when the global scale is a power of two."""
    result: Tensor = dequantize_op(*quantised)
    return result


def fake_quantize(weight: Tensor, recipe: Recipe = PLAIN) -> Tensor:
    """dequantize(quantize(weight)), with the gradient passed straight through to `weight` (through the inverse of the
    Hadamard transform, where the recipe has one). Raises as quantize."""
    result: Tensor = fake_quantize_op(weight, *_flat(recipe))
    return result


def transpose(quantised: NVFP4) -> NVFP4:
    """[..., N, K] of square blocks -> [..., K, N] of the same values, which are the codes of its transpose."""
    codes = torch.stack([quantised.codes & 15, quantised.codes >> 4], dim=-1).flatten(-2).mT
    scales = quantised.scales.view(torch.uint8)[..., ::BLOCK, :].mT.repeat_interleave(BLOCK, -2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return NVFP4(packed, scales.contiguous().view(torch.float8_e4m3fn), quantised.scale2)


def _flat(recipe: Recipe) -> tuple[str, bool, int, int, int | None]:
    """A recipe as registered functions take it: with a seed of 63 bits for the generator."""
    seed = None
    if recipe.generator is not None:
        device = recipe.generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=recipe.generator, device=device))
    return recipe.rule, recipe.square, recipe.hadamard, recipe.signs, seed


def _recipe(device: torch.device, rule: Rule, square: bool, size: int, signs: int, seed: int | None) -> Recipe:
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return Recipe(rule, square, generator, size, signs)


# -- in C


@functools.cache
def _multiples(rule: Rule) -> Any:
    found = plain.MULTIPLES[rule]
    return (ctypes.c_float * len(found))(*found)


def _in_c(native: Library, weight: Tensor, recipe: Recipe, scale2: Tensor | None, **results: Tensor) -> Tensor:
    """Quantise into `results`: codes and scales, or values. Returns the global scales, float32[...]."""
    plain.check(weight, recipe)
    x, multiples = weight.float().contiguous(), _multiples(recipe.rule)
    amax = x.new_zeros(x.shape[:-2])
    found = torch.empty_like(amax) if scale2 is None else scale2.float().expand(amax.shape).clone()
    signs = hadamard.signs(recipe.hadamard, recipe.signs) if recipe.hadamard else None
    job = Quantising(
        x=pointer(x),
        multiples=ctypes.addressof(multiples),
        scale2=pointer(found),
        amax=pointer(amax),
        rotation=Rotation(None if signs is None else pointer(signs), recipe.hadamard),
        seed=recipe.generator.initial_seed() if recipe.generator is not None else 0,
        matrices=amax.numel(),
        rows=x.shape[-2],
        columns=x.shape[-1],
        bound=plain.bound(recipe) if scale2 is None else 0,
        candidates=len(multiples),
        square=recipe.square,
        stochastic=recipe.generator is not None,
        **{name: pointer(tensor) for name, tensor in results.items()},
    )
    refused = native.quantize(ctypes.byref(job), torch.get_num_threads())
    if refused == NOT_FINITE:
        raise plain.not_finite(weight)
    if refused == NO_FIT:
        raise plain.no_fit(found, amax)
    return found


def _dequantize_in_c(native: Library, quantised: NVFP4) -> Tensor:
    codes, scales = quantised.codes.contiguous(), quantised.scales.contiguous()
    scale2 = quantised.scale2.float().expand(codes.shape[:-2]).contiguous()
    values = _space(codes, scales, scale2)
    sizes = scale2.numel(), scales.shape[-2] * scales.shape[-1]
    native.dequantize(*map(pointer, (codes, scales, scale2)), *sizes, pointer(values), torch.get_num_threads())
    return values


# -- what torch knows of it


def _library(tensor: Tensor) -> Library | None:
    return library() if tensor.device.type == "cpu" else None


def _quantize(weight: Tensor, *flat: Any) -> NVFP4:
    *settings, scale2 = flat
    recipe, native = _recipe(weight.device, *settings), _library(weight)
    if native is None:
        return plain.quantize(weight, recipe, scale2)
    codes, scales, _ = _room(weight, *flat)
    return NVFP4(codes, scales, _in_c(native, weight, recipe, scale2, codes=codes, scales=scales))


def _dequantize(*parts: Tensor) -> Tensor:
    native = _library(parts[0])
    return plain.dequantize(NVFP4(*parts)) if native is None else _dequantize_in_c(native, NVFP4(*parts))


def _fake_quantize(weight: Tensor, *flat: Any) -> Tensor:
    recipe, native = _recipe(weight.device, *flat), _library(weight)
    if native is None:
        return plain.fake_quantize(weight, recipe)
    values = _like(weight, *flat)
    _in_c(native, weight, recipe, None, values=values)
    return values


def _room(weight: Tensor, *flat: Any) -> NVFP4:
    """For the results of _quantize."""
    plain.check(weight, _recipe(torch.device("cpu"), *flat[:-1]))
    *batch, rows, columns = weight.shape
    codes = weight.new_empty(*batch, rows, columns // 2, dtype=torch.uint8)
    scales = weight.new_empty(*batch, rows, columns // BLOCK, dtype=torch.float8_e4m3fn)
    return NVFP4(codes, scales, weight.new_empty(batch, dtype=torch.float32))


def _space(codes: Tensor, scales: Tensor, scale2: Tensor) -> Tensor:
    """For the result of _dequantize."""
    return codes.new_empty(*codes.shape[:-1], codes.shape[-1] * 2, dtype=torch.float32)


def _like(weight: Tensor, *flat: Any) -> Tensor:
    """For the result of _fake_quantize."""
    plain.check(weight, _recipe(torch.device("cpu"), *flat))
    return weight.new_empty(weight.shape, dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, ctx.size, ctx.signs, _ = inputs


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    back = hadamard.inverse(gradient, ctx.size, ctx.signs) if ctx.size else gradient
    return back, None, None, None, None, None


RECIPE = "str rule, bool square, int size, int signs, int? seed"
quantize_op = register(
    "nvfp4_quantize", _quantize, _room, f"(Tensor weight, {RECIPE}, Tensor? scale2) -> (Tensor, Tensor, Tensor)"
)
dequantize_op = register(
    "nvfp4_dequantize", _dequantize, _space, "(Tensor codes, Tensor scales, Tensor scale2) -> Tensor"
)
fake_quantize_op = register("nvfp4_fake_quantize", _fake_quantize, _like, f"(Tensor weight, {RECIPE}) -> Tensor")
differentiate(fake_quantize_op, _straight_through, _remember)
