"""A predicted value: a Python literal, compared with the right one type by type. Nothing is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

LONGEST = 20_000
"""Characters of a reply that is read."""
ANY_FENCED = re.compile(r"```\w*[ \t]*\n(.*?)```", re.DOTALL)


class NoLiteral(ValueError):
    """A text that is no literal."""


def predicted(answer: str, reply: str, equal_numbers: bool = False) -> bool:
    """Whether a reply gives the literal `answer`, and no other. `equal_numbers`: 1.0 is 1.

    A parser may die of what it is given, so this belongs in a worker.
    """
    if len(reply) > LONGEST:
        return False
    try:
        found = {form(value(text), equal_numbers) for text in _candidates(reply)}
        return found == {form(value(answer), equal_numbers)}
    except RecursionError:
        return False


def _candidates(reply: str) -> Iterator[str]:
    """Whatever in a reply is a literal: its fenced blocks, where it has any, else the whole, else its lines."""
    texts = [str(block) for block in ANY_FENCED.findall(reply)] or [reply]
    for text in texts:
        if _reads(text):
            yield text
        else:
            yield from (line for line in text.split("\n") if _reads(line))


def _reads(text: str) -> bool:
    try:
        value(text)
    except NoLiteral:
        return False
    return True


def value(text: str) -> Any:
    """What a literal stands for, or what `... == LITERAL` says something is. Raises NoLiteral."""
    try:
        return ast.literal_eval(_literal(ast.parse(text.strip().strip("`")).body))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise NoLiteral(f"no literal: {text[:60]!r}") from error


def _literal(body: list[ast.stmt]) -> ast.expr:
    match body:
        case [ast.Expr(value=ast.Compare(ops=[ast.Eq()], comparators=[right]))]:
            return right
        case [ast.Expr(value=expression)]:
            return expression
        case [ast.Assert(test=ast.Compare(ops=[ast.Eq()], comparators=[right]))]:
            return right
    raise ValueError("neither an expression nor an assertion of an equality")


def form(value: Any, equal_numbers: bool) -> Any:
    """What two values have in common exactly if they are the same, types and all; hashable."""
    if isinstance(value, list | tuple):
        content: Any = tuple(form(item, equal_numbers) for item in value)
    elif isinstance(value, set):
        content = frozenset(form(item, equal_numbers) for item in value)
    elif isinstance(value, dict):
        content = frozenset((form(key, equal_numbers), form(item, equal_numbers)) for key, item in value.items())
    else:
        content = value
    number = equal_numbers and isinstance(value, int | float | complex) and not isinstance(value, bool)
    return "number" if number else type(value).__name__, content
