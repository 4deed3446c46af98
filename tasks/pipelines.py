"""Small programs over a list of integers: said in words, written in Python, and each step with ways to get it wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

INDENT = "    "
SAME = 0.4
"""The share of a list's numbers that are there twice, about."""


class Shape(NamedTuple):
    """A step in general: how it is said and written, how it may go wrong, and from where to where its number runs."""

    said: str
    written: str
    wrong: tuple[str, ...]
    numbers: tuple[int, int] = (0, 0)


class Step(NamedTuple):
    """A step with its number: lines of Python over `xs`."""

    said: str
    written: str
    wrong: tuple[str, ...]


STEPS = (
    Shape("keep the numbers greater than {k}", "xs = [x for x in xs if x > {k}]",
          ("xs = [x for x in xs if x < {k}]", "xs = [x for x in xs if x >= {k} - 9]"), (-30, 10)),
    Shape("keep the numbers less than {k}", "xs = [x for x in xs if x < {k}]",
          ("xs = [x for x in xs if x > {k}]", "xs = [x for x in xs if x <= {k} - 9]"), (-10, 30)),
    Shape("leave out the multiples of {k}", "xs = [x for x in xs if x % {k} != 0]",
          ("xs = [x for x in xs if x % {k} == 0]", "xs = [x for x in xs if x % {k} != 1]"), (2, 9)),
    Shape("add {k} to each number", "xs = [x + {k} for x in xs]",
          ("xs = [x - {k} for x in xs]", "xs = xs + [{k}]"), (1, 60)),
    Shape("multiply each number by {k}", "xs = [x * {k} for x in xs]",
          ("xs = [x + {k} for x in xs]", "xs = xs * {k}"), (2, 20)),
    Shape("take each number modulo {k}", "xs = [x % {k} for x in xs]",
          ("xs = [x // {k} for x in xs]", "xs = [x % ({k} + 1) for x in xs]"), (2, 40)),
    Shape("replace each number by its distance from {k}", "xs = [abs(x - {k}) for x in xs]",
          ("xs = [x - {k} for x in xs]", "xs = [abs(x) - {k} for x in xs]"), (-40, 40)),
    Shape("drop the first {k} numbers", "xs = xs[{k}:]", ("xs = xs[:{k}]", "xs = xs[{k} + 1:]"), (1, 3)),
    Shape("put {k} in front", "xs = [{k}] + xs", ("xs = xs + [{k}]", "xs = [{k}] + xs[1:]"), (-60, 60)),
    Shape("reverse the order", "xs = xs[::-1]", ("xs = sorted(xs)", "xs = xs[:0:-1]")),
    Shape("sort in ascending order", "xs = sorted(xs)", ("xs = sorted(xs, reverse=True)", "xs = sorted(xs, key=abs)")),
    Shape("keep only the first of equal numbers", "xs = list(dict.fromkeys(xs))",
          ("xs = xs[:1]", "xs = [x for x in xs if xs.count(x) == 1]")),
    Shape("replace each number by the sum of all up to it", "xs = [sum(xs[:i + 1]) for i in range(len(xs))]",
          ("xs = [sum(xs[:i]) for i in range(len(xs))]", "xs = [sum(xs[i:]) for i in range(len(xs))]")),
    Shape("take from each number the one before it, and leave out the first",
          "xs = [b - a for a, b in zip(xs, xs[1:])]",
          ("xs = [a - b for a, b in zip(xs, xs[1:])]", "xs = [a + b for a, b in zip(xs, xs[1:])]")),
)  # fmt: skip
RESULTS = (
    Shape("return the list", "return xs", ("return xs[1:]", "return xs[:-1]")),
    Shape("return them as a tuple", "return tuple(xs)", ("return tuple(xs[1:])", "return tuple(xs[::-1])")),
    Shape("return their sum", "return sum(xs)", ("return sum(xs[1:])", "return sum(xs[:-1])")),
    Shape("return the largest, None if there is none", "return max(xs, default=None)",
          ("return min(xs, default=None)", "return max(xs[1:], default=None)")),
    Shape("return the smallest, None if there is none", "return min(xs, default=None)",
          ("return max(xs, default=None)", "return min(xs[1:], default=None)")),
    Shape("return them as text, joined by dashes", 'return "-".join(str(x) for x in xs)',
          ('return "".join(str(x) for x in xs)', 'return "-".join(str(x) for x in xs[1:])')),
    Shape("return a dictionary from each number to how often it is there", "return {x: xs.count(x) for x in xs}",
          ("return {x: 1 for x in xs}", "return {i: x for i, x in enumerate(xs)}")),
)  # fmt: skip


Body = Sequence[str]
"""The lines of a function of `xs`."""


class Pipeline(NamedTuple):
    """Steps one after the other, the last of which returns."""

    steps: tuple[Step, ...]

    @property
    def said(self) -> str:
        """What is done, in words."""
        return "; then ".join(step.said for step in self.steps)

    @property
    def body(self) -> list[str]:
        """It is done right."""
        return [step.written for step in self.steps]

    def mutants(self) -> list[list[str]]:
        """Bodies in which one step goes wrong."""
        body = self.body
        return [
            [*body[:place], wrong, *body[place + 1 :]] for place, step in enumerate(self.steps) for wrong in step.wrong
        ]


def drawn(steps: int, generator: random.Random, results: Sequence[Shape] = RESULTS) -> Pipeline:
    """So many steps and a result."""
    shapes = [*generator.choices(STEPS, k=steps), generator.choice(results)]
    return Pipeline(tuple(_step(shape, generator.randint(*shape.numbers)) for shape in shapes))


def _step(shape: Shape, number: int) -> Step:
    said, written, *wrong = (text.replace("{k}", str(number)) for text in (shape.said, shape.written, *shape.wrong))
    return Step(said, written, tuple(wrong))


def function(body: Body) -> str:
    """The source of f."""
    return "".join(["def f(xs):\n", *(f"{INDENT}{line}\n" for line in body)])


def outcomes(body: Body, inputs: Sequence[Sequence[int]]) -> list[Any]:
    """What f returns for each input. Nothing but our own templates runs here."""
    space: dict[str, Any] = {}
    exec(function(body), space)
    return [space["f"](list(given)) for given in inputs]


def lists(count: int, generator: random.Random) -> list[list[int]]:
    """Lists of integers."""
    return [_list(generator) for _ in range(count)]


def _list(generator: random.Random) -> list[int]:
    numbers = [generator.randint(-40, 40) for _ in range(generator.randint(3, 6))]
    numbers += [number for number in numbers if generator.random() < SAME]
    generator.shuffle(numbers)
    return numbers
