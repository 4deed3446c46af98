"""Small repair tasks: QuixBugs' programs of one wrong line, Exercism's exercises (sources: DATA.md), and generated ones."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palaestra.gym.tasksets import Rows, read_rows, rows
from palaestra.gym.types import Source
from palaestra.tasks.code import two_numbers
from palaestra.tasks.generated import Drawn, Generated

DATA = Path(__file__).with_name("data")
FIXES: dict[str, tuple[str, str]] = {
    "bitcount": ("n ^= n - 1", "n &= n - 1"),
    "bucketsort": ("enumerate(arr)", "enumerate(counts)"),
    "find_first_in_sorted": ("while lo <= hi", "while lo < hi"),
    "find_in_sorted": ("binsearch(mid, end)", "binsearch(mid + 1, end)"),
    "flatten": ("yield flatten(x)", "yield x"),
    "gcd": ("gcd(a % b, b)", "gcd(b, a % b)"),
    "get_factors": ("\n    return []", "\n    return [n]"),
    "hanoi": ("steps.append((start, helper))", "steps.append((start, end))"),
    "is_valid_parenthesization": ("return True", "return depth == 0"),
    "kheapsort": ("for x in arr:", "for x in arr[k:]:"),
    "knapsack": ("if weight < j", "if weight <= j"),
    "kth": ("return kth(above, k)", "return kth(above, k - num_lessoreq)"),
    "lcs_length": ("dp[i - 1, j] + 1", "dp[i - 1, j - 1] + 1"),
    "levenshtein": ("return 1 + levenshtein(source[1:], target[1:])", "return levenshtein(source[1:], target[1:])"),
    "lis": ("longest = length + 1", "longest = max(longest, length + 1)"),
    "longest_common_subsequence": ("longest_common_subsequence(a[1:], b)\n", "longest_common_subsequence(a[1:], b[1:])\n"),
    "max_sublist_sum": ("max_ending_here + x", "max(0, max_ending_here + x)"),
    "mergesort": ("len(arr) == 0", "len(arr) <= 1"),
    "next_palindrome": ("(len(digit_list)) * [0]", "(len(digit_list) - 1) * [0]"),
    "next_permutation": ("if perm[j] < perm[i]", "if perm[i] < perm[j]"),
    "pascal": ("range(0, r)", "range(0, r + 1)"),
    "possible_change": ("if total < 0:", "if total < 0 or not coins:"),
    "powerset": ("return [[first] + subset for subset in rest_subsets]", "return rest_subsets + [[first] + subset for subset in rest_subsets]"),
    "quicksort": ("x > pivot", "x >= pivot"),
    "rpn_eval": ("op(token, a, b)", "op(token, b, a)"),
    "shunting_yard": ("(opstack.pop())\n\n    while", "(opstack.pop())\n            opstack.append(token)\n\n    while"),
    "sieve": ("if any(", "if all("),
    "sqrt": ("abs(x - approx)", "abs(x - approx ** 2)"),
    "subsequences": ("return []", "return [[]]"),
    "to_base": ("result = result + alphabet[i]", "result = alphabet[i] + result"),
    "wrap": ("    return lines", "    lines.append(text)\n    return lines"),
}  # fmt: skip
"""What is wrong in each program of QuixBugs, and what is right."""
PASSED_OVER = {("quixbugs", "knapsack"): 1, ("quixbugs", "levenshtein"): 1, ("exercism", "alphametics"): 1}
"""How many tests of a task are skipped with the right solution, where any are: those that take minutes, an extra one."""


@functools.lru_cache(maxsize=1)
def quixbugs() -> Rows:
    """QuixBugs' Python programs that have tests of plain data; `data`: files, tests, solution (files by path), skips."""
    return rows(
        [row for row in read_rows(DATA / "quixbugs_buggy.jsonl.gz") if row["json_tests"]],
        prompt=lambda row: f"A line of {row['name']}.py is wrong. Its description stands below the code. Repair it.",
        key="name",
        data={
            "files": lambda row: {f"{row['name']}.py": row["buggy"]},
            "tests": lambda row: {f"tests/test_{row['name']}.py": _tests(row)},
            "solution": lambda row: {f"{row['name']}.py": _fixed(row)},
            "skips": lambda row: PASSED_OVER.get(("quixbugs", row["name"]), 0),
        },
        origin=Source(dataset="quixbugs", licence="MIT"),
    )


def _fixed(row: Mapping[str, Any]) -> str:
    old, new = FIXES[row["name"]]
    if row["buggy"].count(old) != 1:
        raise ValueError(f"QuixBugs {row['name']}: {old!r} does not stand there once")
    return str(row["buggy"].replace(old, new, 1))


def _tests(row: Mapping[str, Any]) -> str:
    """The row's own tests, with its data in the place of the file that they were read from."""
    name = row["name"]
    rest = row["pytest"].partition("testdata = load_json_testcases(")[2].partition("\n")[2]
    head = f"import pytest\nfrom {name} import {name}\n\ntestdata = {row['json_tests']!r}\n"
    return head + str(rest).replace("pytest.run_slow", "False")


@functools.lru_cache(maxsize=1)
def exercism() -> Rows:
    """Exercism's Python exercises: a stub to fill; `data`: files, tests, solution (files by path), skips."""
    return rows(
        DATA / "exercism_python_90.jsonl.gz",
        prompt=lambda row: f"{row['instructions']}\n\nWrite your solution into {row['solution_files'][0]}.",
        key="slug",
        data={
            "files": lambda row: {name: row["files"][name] for name in row["solution_files"]},
            "tests": lambda row: {name: row["files"][name] for name in row["test_files"]},
            "solution": lambda row: dict(zip(row["solution_files"], row["example"], strict=True)),
            "skips": lambda row: PASSED_OVER.get(("exercism", row["slug"]), 0),
        },
        origin=Source(dataset="exercism", licence="MIT"),
    )


def small(levels: tuple[int, ...]) -> Generated:
    """Modules of one function, one part of which is wrong; `data` as the others', no skips."""
    return Generated("small-repairs", _small, levels)


def _small(level: int, r: random.Random) -> Drawn:
    drawn, right, mistakes = _mistakable(level, r)
    while not mistakes:
        drawn, right, mistakes = _mistakable(level, r)
    names, wrong = drawn.data["parameters"], r.choice(mistakes)
    tests = drawn.data["tests"].replace("\n", "\n    ")
    data = {
        "files": {"small.py": _module(names, wrong)},
        "tests": {"test_small.py": f"from small import f\n\n\ndef test_f():\n    {tests}\n"},
        "solution": {"small.py": _module(names, right)},
    }
    return Drawn(f"small.py is wrong. {drawn.prompt.replace('Write', 'It should hold', 1)}", data)


def _mistakable(level: int, r: random.Random) -> tuple[Drawn, str, list[str]]:
    """A function, a right expression for it, and those wrong ones that its tests find out."""
    drawn = two_numbers(level, r)
    right = str(r.choice(drawn.data["expressions"]))
    return drawn, right, [wrong for wrong in _mistaken(right) if not _passes(drawn, wrong)]


def _module(parameters: str, expression: str) -> str:
    return f"def f({parameters}):\n    return {expression}\n"


def _passes(drawn: Drawn, expression: str) -> bool:
    space: dict[str, object] = {}
    exec(_module(drawn.data["parameters"], expression), space)
    try:
        exec(drawn.data["tests"], space)
    except (AssertionError, ZeroDivisionError):
        return False
    return True


MISTAKES = (("max(", "min("), ("min(", "max("), (" + ", " - "), (" - ", " + "), (" * ", " + "), ("abs(", "("), (" > ", " < "), (" < ", " > "))  # fmt: skip


def _mistaken(right: str) -> list[str]:
    """The expression with another operation, another function or a number that is off by one."""
    places = [(m.start(), old, new) for old, new in MISTAKES for m in re.finditer(re.escape(old), right)]
    for m in re.finditer(r"\b\d+\b", right):
        places += [(m.start(), m[0], str(int(m[0]) + step)) for step in (-1, 1)]
    return [right[:start] + new + right[start + len(old) :] for start, old, new in places]
