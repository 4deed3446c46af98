"""Small functions to write."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from palaestra.tasks.generated import Drawn, Generated

LETTERS = "abcdefghijkmnpqrstuvwxyz"
CASES = 8


class Shape(NamedTuple):
    """A function of two numbers: how it is said, and the ways to write it."""

    said: str
    written: tuple[str, ...]
    value: Callable[[int, int], int]


SHAPES = (
    Shape("the larger of {a} and {b}", ("max({a}, {b})", "({a} if {a} > {b} else {b})"), max),
    Shape("the smaller of {a} and {b}", ("min({a}, {b})", "({a} if {a} < {b} else {b})"), min),
    Shape("the sum of {a} and {b}", ("({a} + {b})", "sum([{a}, {b}])"), lambda a, b: a + b),
    Shape("the difference {a} minus {b}", ("({a} - {b})", "(-{b} + {a})"), lambda a, b: a - b),
    Shape("the product of {a} and {b}", ("({a} * {b})", "({b} * {a})"), lambda a, b: a * b),
    Shape("the distance of {a} and {b}", ("abs({a} - {b})", "abs({b} - {a})"), lambda a, b: abs(a - b)),
)
STEPS: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    ("plus {k}", "+ {k}", lambda x, k: x + k),
    ("minus {k}", "- {k}", lambda x, k: x - k),
    ("times {k}", "* {k}", lambda x, k: x * k),
    ("modulo {k}", "% {k}", lambda x, k: x % k),
)


def functions(levels: tuple[int, ...]) -> Generated:
    """Functions of two integers: a shape, then `level` - 1 steps with constants."""
    return Generated("functions", function, levels)


def function(level: int, generator: random.Random) -> Drawn:
    """`data`: entry_point, tests (Python source), expressions (right ways to write the result)."""
    a, b = generator.sample(LETTERS, 2)
    shape = generator.choice(SHAPES)
    steps = [(generator.choice(STEPS), generator.randint(2, 99)) for _ in range(level - 1)]
    said = ", ".join([shape.said, *(step[0] for step, _ in steps)])
    for _, number in steps:
        said = said.replace("{k}", str(number), 1)
    cases = [(generator.randint(-50, 50), generator.randint(-50, 50)) for _ in range(CASES)]
    tests = "\n".join(f"assert f({x}, {y}) == {_value(shape, steps, x, y)}" for x, y in cases)
    written = [_written(way.format(a=a, b=b), steps) for way in shape.written]
    prompt = f"Write f({a}, {b}): {said.format(a=a, b=b)}."
    data = {"entry_point": "f", "tests": tests, "parameters": f"{a}, {b}", "expressions": written}
    return Drawn(prompt, data)


Steps = list[tuple[tuple[str, str, Callable[[int, int], int]], int]]


def _value(shape: Shape, steps: Steps, x: int, y: int) -> int:
    value = shape.value(x, y)
    for (_, _, apply), number in steps:
        value = apply(value, number)
    return value


def _written(expression: str, steps: Steps) -> str:
    """The steps applied one after the other, with parentheses where the order needs them."""
    for place, ((_, operation, _), number) in enumerate(steps):
        inner = f"({expression})" if place and operation[0] in "*%" else expression
        expression = f"{inner} {operation.format(k=number)}"
    return expression[1:-1] if not steps and expression.startswith("(") else expression
