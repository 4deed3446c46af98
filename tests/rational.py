"""NVFP4 by its definition, in rational numbers: a second implementation that tests compare the kernels with."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

E2M1 = [Fraction(text) for text in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
E4M3 = [Fraction(code, 512) for code in range(8)] + [
    Fraction(8 + code % 8) * Fraction(2) ** (code // 8 - 10) for code in range(8, 127)
]
"""The magnitudes of each format, by code."""
MIDDLES = {len(grid): [(low + high) / 2 for low, high in pairwise(grid)] for grid in (E2M1, E4M3)}
"""What lies between the magnitudes, by their number."""
ONE = E4M3.index(Fraction(1))
MULTIPLES = {"max": [1.0], "error": [2.0 ** (eighth / 8) for eighth in range(-4, 8)], "four-or-six": [1.0, 1.5]}
"""Of the scale that makes a block's largest magnitude 6: those among which a rule looks."""


def nearest(value: Fraction, grid: Sequence[Fraction]) -> int:
    """The code of the nearest magnitude, ties to the even code, the largest for what lies beyond it."""
    middle = MIDDLES[len(grid)]
    code = bisect_left(middle, value)
    return code + 1 if code % 2 and code < len(middle) and middle[code] == value else code


def global_scale(largest: float, bound: int = 448) -> Fraction:
    """The smallest power of two under which no block scale exceeds the bound, but none below 2^-116; 1 for zeros."""
    if not largest:
        return Fraction(1)
    exponent = -116
    while Fraction(2) ** exponent < Fraction(largest) / 6 / bound:
        exponent += 1
    return Fraction(2) ** exponent


def scales(largest: float, scale2: Fraction, rule: str) -> list[set[int]]:
    """Of each candidate of the rule the E4M3 codes that it may round to: one, but where the multiple is no number of
    few bits, both beside a tie that is nearer than float32 can tell."""
    found = []
    for multiple in MULTIPLES[rule]:
        ideal = Fraction(largest) * Fraction(multiple) / 6 / scale2
        slack = 0 if multiple in (1.0, 1.5) else ideal / 2**22
        found.append({max(nearest(near, E4M3), 1) for near in (ideal - slack, ideal, ideal + slack)})
    return found


def codes(values: Sequence[float], scale: Fraction) -> list[int]:
    """The E2M1 codes of float32 values under a scale, their signs in bit 3."""
    return [nearest(abs(Fraction(v)) / scale, E2M1) | (math.copysign(1, v) < 0) << 3 for v in values]


def error(values: Sequence[float], scale: Fraction) -> Fraction:
    """The sum of squares by which the values change."""
    ratios = [abs(Fraction(value)) / scale for value in values]
    return sum(((E2M1[nearest(ratio, E2M1)] - ratio) ** 2 for ratio in ratios), Fraction(0)) * scale**2
