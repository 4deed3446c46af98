"""Bugs made by editing a syntax tree: each changes a few characters of one function, and leaves the rest as it stands.

The kinds follow SWE-smith's procedural ones (Yang et al. 2025, SWE-smith: Scaling Data for Software Engineering
Agents).
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Edit(NamedTuple):
    """A replacement of the characters from `start` to `end` of a file's text. `function`: the dotted name of the one
    that it changes."""

    kind: str
    function: str
    start: int
    end: int
    text: str


class Source:
    """A module's text, its syntax tree, and where nodes stand in the text. Raises SyntaxError."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._lines = text.splitlines(keepends=True)

    def place(self, line: int, column: int) -> int:
        """The index of a character; ast counts columns in bytes of UTF-8."""
        text = self._lines[line - 1] if line <= len(self._lines) else ""
        return self._starts[line - 1] + len(text.encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends."""
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        """A node's text."""
        start, end = self.span(node)
        return self.text[start:end]

    def block(self, body: list[ast.stmt]) -> tuple[int, int]:
        """Where the statements of a body begin and end, from the first one's column on."""
        return self.span(body[0])[0], self.span(body[-1])[1]


Replacements = Iterator[tuple[int, int, str]]
Operator = Callable[[Source, ast.AST], Replacements]

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in",
    ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "//", ast.BitAnd: "|",
    ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip


def flip_comparison(source: Source, node: ast.AST) -> Replacements:
    """`a < b` becomes `a <= b`, `a == b` becomes `a != b`, and so on."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        start, end = source.span(node)
        yield start, end, f"{source.of(node.left)} {COMPARISONS[type(node.ops[0])]} {source.of(node.comparators[0])}"


def change_operator(source: Source, node: ast.AST) -> Replacements:
    """`a + b` becomes `a - b`, and so on; texts are left alone."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        texts = (ast.Constant, ast.JoinedStr)
        if not any(
            isinstance(side, texts) and isinstance(getattr(side, "value", ""), str) for side in (node.left, node.right)
        ):
            start, end = source.span(node)
            yield start, end, f"{source.of(node.left)} {ARITHMETIC[type(node.op)]} {source.of(node.right)}"


def swap_and_or(source: Source, node: ast.AST) -> Replacements:
    """`a and b` becomes `a or b`, and the other way round."""
    if isinstance(node, ast.BoolOp):
        start, end = source.span(node)
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield start, end, f"({word.join(source.of(value) for value in node.values)})"


def negate_condition(source: Source, node: ast.AST) -> Replacements:
    """`if a` becomes `if not (a)`; `if not a` becomes `if a`."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        start, end = source.span(node.test)
        if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
            yield start, end, source.of(node.test.operand)
        else:
            yield start, end, f"not ({source.of(node.test)})"


def swap_branches(source: Source, node: ast.AST) -> Replacements:
    """The two branches of an if change places."""
    if (
        isinstance(node, ast.If)
        and node.orelse
        and not _is_elif(source, node)
        and node.body[0].col_offset == node.orelse[0].col_offset
    ):
        (start, middle), (after, end) = source.block(node.body), source.block(node.orelse)
        yield start, end, source.text[after:end] + source.text[middle:after] + source.text[start:middle]


def _is_elif(source: Source, node: ast.If) -> bool:
    return len(node.orelse) == 1 and source.of(node.orelse[0]).startswith("elif")


def remove_guard(source: Source, node: ast.AST) -> Replacements:
    """An if that only leaves (return, raise, continue, break) is gone."""
    if (
        isinstance(node, ast.If)
        and not node.orelse
        and isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
        and not source.of(node).startswith("elif")
    ):
        yield (*source.span(node), "pass")


def shift_constant(source: Source, node: ast.AST) -> Replacements:
    """An integer becomes one more or one less."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        for value in (node.value + 1, node.value - 1):
            yield (*source.span(node), str(value) if value >= 0 else f"({value})")


def flip_boolean(source: Source, node: ast.AST) -> Replacements:
    """True becomes False."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield (*source.span(node), str(not node.value))


def return_nothing(source: Source, node: ast.AST) -> Replacements:
    """`return a` becomes `return None`."""
    if isinstance(node, ast.Return) and node.value is not None and source.of(node.value) != "None":
        yield (*source.span(node.value), "None")


def drop_call(source: Source, node: ast.AST) -> Replacements:
    """A statement that is a call is gone."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield (*source.span(node), "pass")


def drop_update(source: Source, node: ast.AST) -> Replacements:
    """`a += b` is gone."""
    if isinstance(node, ast.AugAssign):
        yield (*source.span(node), "pass")


def swap_arguments(source: Source, node: ast.AST) -> Replacements:
    """The first two arguments of a call change places."""
    if (
        isinstance(node, ast.Call)
        and len(node.args) >= 2
        and not any(isinstance(a, ast.Starred) for a in node.args[:2])
    ):
        (start, middle), (after, end) = source.span(node.args[0]), source.span(node.args[1])
        first, second = source.text[start:middle], source.text[after:end]
        if first != second:
            yield start, end, second + source.text[middle:after] + first


def shift_slice(source: Source, node: ast.AST) -> Replacements:
    """A slice begins one later, or ends one earlier."""
    if isinstance(node, ast.Slice):
        if node.lower is not None:
            yield (*source.span(node.lower), f"{source.of(node.lower)} + 1")
        if node.upper is not None:
            yield (*source.span(node.upper), f"{source.of(node.upper)} - 1")


def leave_loop(source: Source, node: ast.AST) -> Replacements:
    """`continue` becomes `break`."""
    if isinstance(node, ast.Continue):
        yield (*source.span(node), "break")


OPERATORS: tuple[Operator, ...] = (
    flip_comparison, change_operator, swap_and_or, negate_condition, swap_branches, remove_guard, shift_constant,
    flip_boolean, return_nothing, drop_call, drop_update, swap_arguments, shift_slice, leave_loop,
)  # fmt: skip


def edits(text: str) -> list[Edit]:
    """Every edit of every function of a module, each of which leaves text that parses and means something else.

    Raises SyntaxError where the module itself does not parse.
    """
    source = Source(text)
    whole = ast.dump(source.tree)
    found = []
    for function, name in _functions(source.tree):
        for node in _inside(function):
            for operator in OPERATORS:
                for start, end, replacement in operator(source, node):
                    edit = Edit(operator.__name__, name, start, end, replacement)
                    if _differs(applied(text, [edit]), whole):
                        found.append(edit)
    return found


def applied(text: str, chosen: list[Edit]) -> str:
    """The text after edits. Raises ValueError where two overlap."""
    ordered = sorted(chosen, key=lambda edit: edit.start, reverse=True)
    for later, earlier in itertools.pairwise(ordered):
        if earlier.end > later.start:
            raise ValueError(f"edits overlap: {earlier.kind} and {later.kind} in {earlier.function}")
    for edit in ordered:
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def _differs(text: str, whole: str) -> bool:
    try:
        return ast.dump(ast.parse(text)) != whole
    except (SyntaxError, ValueError):
        return False


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """The outermost functions, methods included, with their dotted names."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, prefix + child.name
            elif isinstance(child, ast.ClassDef):
                yield from below(child, f"{prefix}{child.name}.")
            else:
                yield from below(child, prefix)

    return below(tree, "")


def _inside(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body: no annotations, no decorators."""
    for statement in function.body:
        yield from _walk(statement)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)
