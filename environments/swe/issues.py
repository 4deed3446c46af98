"""What a bug report says, from the failures of tests that the agent does not see."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from palaestra.environments.swe.mutations import Edit

SHOWN, LINES, WIDTH = 3, 6, 200
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def issue(package: str, level: int, chosen: Sequence[tuple[str, Edit]], failures: Mapping[str, str]) -> str:
    """A report on a package. Level 1 names the function and shows failures, 2 shows failures, 3 names what fails.

    `failures`: the text of each failing test.
    """
    tests = list(failures)
    count = f"{len(tests)} {'behaviour is' if len(tests) == 1 else 'behaviours are'}"
    parts = [f"{package}: {count} wrong since the last change."]
    if level == 1:
        where = " and ".join(f"`{edit.function}` ({file})" for file, edit in chosen)
        parts.append(f"The fault seems to lie in {where}.")
    for test in tests[:SHOWN]:
        said = _said(failures[test])
        parts.append(f"- {_words(test)}" + (f":\n\n{said}" if level < 3 and said else ""))
    if len(tests) > SHOWN:
        parts.append(f"- and {len(tests) - SHOWN} more")
    parts.append("Repair the package so that these work again, and everything else goes on working.")
    return "\n\n".join(parts)


def _words(test: str) -> str:
    """A test's name as words: `tests/test_a.py::TestB::test_big_numbers[3]` is `big numbers (3)`."""
    name = test.rpartition("::")[2]
    plain, _, given = name.partition("[")
    words = (
        re.sub(r"([a-z])([A-Z])", r"\1 \2", plain.removeprefix("test_").removeprefix("test")).replace("_", " ").strip()
    )
    return f"{words or plain} ({given.rstrip(']')})" if given else words or plain


def _said(text: str) -> str:
    """The lines of a failure that say what was expected and what came."""
    lines = [ADDRESS.sub("", line[1:]).strip() for line in text.splitlines() if line.startswith("E ")]
    shown = [f"      {line[:WIDTH]}" for line in lines[:LINES] if line]
    return "\n".join(shown)
