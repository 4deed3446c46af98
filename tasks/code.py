"""Small functions to write; and small programs to write, complete, repair, test and read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from palaestra.tasks import pipelines
from palaestra.tasks.generated import Drawn, Generated
from palaestra.tasks.pipelines import INDENT, Pipeline, function, outcomes
from palaestra.tasks.pipelines import Shape as Result

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
    return Generated("functions", two_numbers, levels)


def two_numbers(level: int, generator: random.Random) -> Drawn:
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


# -- pipelines: level + 1 steps over a list of integers, and a result

FEWEST_MUTANTS, MOST_MUTANTS = 3, 5
GAP = "____"
PRINTED = tuple(
    Result(said, f"return {written}", ())
    for said, written in (
        ("print them on a line, separated by blanks", '" ".join(map(str, xs))'),
        ("print them on a line, separated by commas", '",".join(map(str, xs))'),
        ("print each on a line of its own", '"\\n".join(map(str, xs))'),
        ("print their sum", "sum(xs)"),
        ("print how many they are, and after a blank their sum", 'f"{len(xs)} {sum(xs)}"'),
    )
)
READ: tuple[tuple[str, str, Callable[[list[str]], str]], ...] = (
    ("a line of integers, separated by blanks", "xs = [int(word) for word in input().split()]", " ".join),
    (
        "a number n, then n lines with an integer each",
        "xs = [int(input()) for _ in range(int(input()))]",
        lambda words: "\n".join([str(len(words)), *words]),
    ),
)


def programs(levels: tuple[int, ...]) -> Generated:
    """Programs from standard input to standard output; `data`: kind, cases, solution."""
    return Generated("programs", _program, levels)


def gaps(levels: tuple[int, ...]) -> Generated:
    """Functions in which steps are missing; `data`: kind, entry_point, tests, prefix, suffix, solution."""
    return Generated("gaps", _gap, levels)


def predictions(levels: tuple[int, ...]) -> Generated:
    """Functions whose value is asked for; `data`: kind, answer."""
    return Generated("predictions", _prediction, levels)


def repairs(levels: tuple[int, ...]) -> Generated:
    """Functions with a wrong step; `data`: kind, entry_point, tests, solution."""
    return Generated("repairs", _repair, levels)


def suites(levels: tuple[int, ...]) -> Generated:
    """Functions to write tests for; `data`: kind, entry_point, right, mutants, solution."""
    return Generated("test suites", _test_suite, levels)


class Posed(NamedTuple):
    """A pipeline with inputs and what it makes of them."""

    pipeline: Pipeline
    inputs: list[list[int]]
    values: list[Any]

    @property
    def tests(self) -> str:
        """An assertion for each input."""
        return "\n".join(f"assert f({g}) == {v!r}" for g, v in zip(self.inputs, self.values, strict=True))

    def wrong(self, body: Sequence[str]) -> bool:
        """Whether another body makes something else of them."""
        return outcomes(body, self.inputs) != self.values


def _posed(level: int, generator: random.Random, results: Sequence[Result] = pipelines.RESULTS) -> Posed:
    """One whose values tell much: most of them differ."""
    while True:
        pipeline = pipelines.drawn(level + 1, generator, results)
        inputs = pipelines.lists(CASES, generator)
        values = outcomes(pipeline.body, inputs)
        if len(set(map(repr, values))) > CASES // 2:
            return Posed(pipeline, inputs, values)


def _program(level: int, generator: random.Random) -> Drawn:
    pipeline, inputs, values = _posed(level, generator, PRINTED)
    said, read, given = generator.choice(READ)
    *steps, result = pipeline.body
    program = "\n".join([read, *steps, f"print({result.removeprefix('return ')})"]) + "\n"
    cases = [
        {"stdin": given(list(map(str, numbers))) + "\n", "stdout": f"{value}\n"}
        for numbers, value in zip(inputs, values, strict=True)
    ]
    prompt = f"Write a Python program. It reads {said}. It shall {pipeline.said}."
    return Drawn(prompt, {"kind": "stdio", "cases": cases, "solution": program})


def _gap(level: int, generator: random.Random) -> Drawn:
    while True:
        posed = _posed(level, generator)
        body = posed.pipeline.body
        first = generator.randrange(len(body) - 1)
        last = generator.randint(first + 1, len(body) - 1)
        if posed.wrong([*body[:first], *body[last:]]):
            break
    prefix = function(body[:first]) + INDENT
    suffix = "".join(f"\n{INDENT}{line}" for line in body[last:]) + "\n"
    prompt = f"Write what is missing at {GAP}. The function shall {posed.pipeline.said}.\n\n{prefix}{GAP}{suffix}"
    solution = f"\n{INDENT}".join(body[first:last])
    data = {"kind": "infilling", "prefix": prefix, "suffix": suffix, "solution": solution}
    return Drawn(prompt, {**data, "entry_point": "f", "tests": posed.tests})


def _prediction(level: int, generator: random.Random) -> Drawn:
    pipeline, inputs, values = _posed(level, generator)
    place = max(range(CASES), key=lambda at: len(repr(values[at])))
    question = f"assert f({inputs[place]}) == ??"
    prompt = f"What stands for ??, as a Python literal?\n\n{function(pipeline.body)}\n{question}"
    return Drawn(prompt, {"kind": "prediction", "answer": repr(values[place])})


def _mutated(level: int, generator: random.Random, fewest: int) -> tuple[Posed, list[list[str]]]:
    """A pipeline, and bodies that its inputs show to be wrong."""
    while True:
        posed = _posed(level, generator)
        mutants = [body for body in posed.pipeline.mutants() if posed.wrong(body)]
        if len(mutants) >= fewest:
            return posed, mutants


def _repair(level: int, generator: random.Random) -> Drawn:
    posed, mutants = _mutated(level, generator, 1)
    buggy = function(generator.choice(mutants))
    prompt = f"Repair f. It shall {posed.pipeline.said}.\n\n{buggy}"
    right = function(posed.pipeline.body)
    return Drawn(prompt, {"kind": "repair", "entry_point": "f", "tests": posed.tests, "solution": right})


def _test_suite(level: int, generator: random.Random) -> Drawn:
    posed, mutants = _mutated(level, generator, FEWEST_MUTANTS)
    chosen = [function(body) for body in generator.sample(mutants, min(MOST_MUTANTS, len(mutants)))]
    prompt = (
        f"Write tests for f, a function of a list of integers. It shall {posed.pipeline.said}. Write assert statements "
        "that hold for f and fail for a function that goes wrong anywhere. f itself is there already."
    )
    right = function(posed.pipeline.body)
    data = {"kind": "testwriting", "entry_point": "f", "right": right, "mutants": chosen, "solution": posed.tests}
    return Drawn(prompt, data)
