"""Whether a reply gives a mathematical answer. Runs in a worker process: math-verify needs a main thread."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
PLAIN = re.compile(r"\$?\s*([-+]?(?:\d{1,3}(?:,\d{3}){1,13}|\d{1,40})(?:\.\d{1,40})?)\s*\.?\s*\$?")
CURRENCY = re.compile(r"(?<!\\)\\\$")
GROUPED = re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))")
BASE = re.compile(r"-?[\dA-F.,]+_\{?(\d+)\}?")
ALTERNATIVES = re.compile(r"\s+or\s+|\s+maybe\s+|\s+perhaps\s+|;", re.IGNORECASE)


def boxed(text: str) -> list[str]:
    r"""The contents of every \boxed{...}, braces balanced."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[match.end() : at - 1])
    return found


def last_line(text: str) -> str:
    """The last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def plain(text: str) -> Fraction | None:
    """The number that a text is, if it is nothing but a plain number."""
    match = PLAIN.fullmatch(text.strip())
    return Fraction(match[1].replace(",", "")) if match else None


def quick(answer: object, reply: str) -> bool | None:
    """The verdict where both are plain numbers, which needs no algebra; None where it takes `equivalent`."""
    given, wanted = plain(reply), plain(str(answer))
    return None if given is None or wanted is None else given == wanted


def equivalent(answer: object, reply: str) -> bool:
    r"""Whether the reply's last \boxed, else its last line, equals the answer (LaTeX or a number).

    Two different candidates earn nothing: boxes that differ, or alternatives in the line.
    """
    boxes = boxed(reply)
    candidates = boxes or _candidates(last_line(reply))
    if not candidates:
        return False
    first, *others = candidates
    return all(_equal(first, other) for other in others) and _equal(str(answer), first)


def _candidates(line: str) -> list[str]:
    """What a line offers as its answer: alternatives, or the numbers of a sentence; an equation offers its end."""
    line = line.rpartition("=")[2] if "=" in line else line
    parts = [part for part in ALTERNATIVES.split(line) if part.strip()]
    if len(parts) > 1 and all(NUMBER.search(part) or "\\" in part for part in parts):
        return parts
    numbers = NUMBER.findall(line)
    if len(numbers) > 1 and "\\" not in line and "$" not in line and re.search(r"[A-Za-z]{2}", line):
        return numbers
    return [line]


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Sequence[object]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    wrapped = text if "\\boxed" in text or "$" in text else f"${text}$"
    found = parse(wrapped, parsing_timeout=5) or parse(text, parsing_timeout=5)
    return list(found)


def _equal(gold: str, given: str) -> bool:
    from math_verify import verify

    gold, given = _bare(gold), _bare(given)
    left, right = plain(gold), plain(given)
    if left is not None and right is not None:
        return left == right
    bases = {match[1] for match in map(BASE.fullmatch, (gold, given)) if match}
    return len(bases) < 2 and bool(verify(_parsed(gold), _parsed(given), timeout_seconds=5))


def _bare(text: str) -> str:
    r"""Without what math-verify stumbles over: a currency's \$, and 1,\!000 for 1000."""
    return GROUPED.sub("", CURRENCY.sub("", text)).strip()
