"""Arithmetic word problems."""

from __future__ import annotations

import random

from palaestra.tasks.generated import Drawn, Generated
from palaestra.tasks.words import PEOPLE, THINGS

LARGEST = 999


def word_problems(levels: tuple[int, ...]) -> Generated:
    """Word problems of `level` steps over numbers up to 999."""
    return Generated("word-problems", _problem, levels)


def _problem(level: int, generator: random.Random) -> Drawn:
    """`data`: answer (int), expression (what the calculator takes)."""
    who, other = generator.sample(PEOPLE, 2)
    thing = generator.choice(THINGS)
    value = generator.randint(5, 99)
    expression, clauses = str(value), [f"{who} has {value} {thing}."]
    for _ in range(level):
        sign, number = _operation(value, generator)
        clauses.append(_clause(sign, number, who, other, generator))
        expression = f"({expression})*{number}" if sign == "*" and len(clauses) > 2 else f"{expression}{sign}{number}"
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
    question = f"How many {thing} does {who} have now?"
    return Drawn(" ".join([*clauses, question]), {"answer": value, "expression": expression})


def _operation(value: int, generator: random.Random) -> tuple[str, int]:
    """An operation that keeps the value between 1 and 999."""
    options = ["+"] if value < LARGEST - 99 else []
    options += ["-"] if value > 3 else []
    options += ["*"] if value * 2 <= LARGEST else []
    sign = generator.choice(options)
    if sign == "+":
        return sign, generator.randint(2, 99)
    return sign, generator.randint(2, min(value - 1, 99)) if sign == "-" else generator.randint(
        2, min(9, LARGEST // value)
    )


def _clause(sign: str, number: int, who: str, other: str, generator: random.Random) -> str:
    gains = (f"{who} buys {number} more.", f"{other} gives {who} {number} more.", f"{who} finds {number} more.")
    losses = (f"{who} loses {number}.", f"{who} gives {other} {number}.", f"{who} sells {number}.")
    grows = (f"Then {who} gets {number} times as many.",)
    return generator.choice({"+": gains, "-": losses, "*": grows}[sign])
