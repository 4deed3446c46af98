"""Gold answers of the shipped rows are accepted, answers of other rows are not: `palaestra env score` on all of them.

A gold answer that is refused is an exception only where the reference is at fault, which is found out without our
verifiers: math-verify alone parses nothing in it, or plain Python runs the row's own reference against the row's tests
and they fail.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from bars import Measured

from palaestra.gym.types import Task
from palaestra.tasks import real

COMMAND = Path(sys.executable).with_name("palaestra")
SECONDS = 3600
EXCEPTIONS = 0.01
"""The largest share of a source's rows whose reference may be at fault."""

SPELLINGS = (
    (r"\\[!,;: ]|\\(?:left|right|displaystyle|quad)(?![a-z])|[\s~$]|\\\$|\\?%|\^\\circ|\^\{\\circ\}", ""),
    (r"(?<=[\di}])\\(?:text|mbox)\{[^{}]*\}(?:\^\d)?$", ""),
    (r"\\(?:text|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\d)", r"\\sqrt{\1}"),
    (r"\}(\d)$", r"}{\1}"),
    (r"\\frac\{(\d+)\}\{(\d+)\}\\pi", r"\\frac{\1\\pi}{\2}"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"(?<=[\dA-F])_\{?\d+\}?$", ""),
    (r"^[a-z](?:=|\\in)", ""),
)
"""What different answers may not differ by alone: spaces and sizes, units, ways of writing, a number's base, a name."""


class Case(NamedTuple):
    """A reply to a task."""

    task: Task
    reply: str


class Kind(NamedTuple):
    """How the rows of an environment are measured: their gold replies, others that differ, a reference's fault."""

    environment: str
    gold: Callable[[Task], str]
    differing: Callable[[Sequence[Task]], list[Case]]
    fault: Callable[[Task], str]


# -- answers that differ


def neighbours(tasks: Sequence[Task], spelt: Callable[[Task], str]) -> list[tuple[Task, Task]]:
    """Every task with two others whose answer is spelt differently: the next row, and the nearest in spelling."""
    nearest = sorted(tasks, key=spelt)
    return [*_followers(tasks, spelt), *_followers(nearest, spelt)]


def _followers(tasks: Sequence[Task], spelt: Callable[[Task], str]) -> list[tuple[Task, Task]]:
    found = []
    for at, task in enumerate(tasks, 1):
        others = islice(cycle(tasks), at, at + len(tasks))
        found.append((task, next(other for other in others if spelt(other) != spelt(task))))
    return found


# -- mathematics


def boxed(task: Task) -> str:
    """The answer in a box."""
    return f"\\boxed{{{task.data['answer']}}}"


def spelling(task: Task) -> str:
    """A mathematical answer in one of its spellings, a number as a fraction."""
    text = str(task.data["answer"])
    for pattern, instead in SPELLINGS:
        text = re.sub(pattern, instead, text)
    fraction = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text)
    with contextlib.suppress(ValueError):
        return str(Fraction("{}{}/{}".format(*fraction.groups()) if fraction else text))
    return text


def math_differing(tasks: Sequence[Task]) -> list[Case]:
    """The boxed answers of two other rows."""
    return [Case(task, boxed(other)) for task, other in neighbours(tasks, spelling)]


def math_fault(task: Task) -> str:
    """Whether math-verify, given nothing but the boxed answer, finds no mathematics: it hands back the mere text."""
    from math_verify import parse

    found = any(not isinstance(part, str) for part in parse(boxed(task)))
    return "" if found else f"math-verify parses nothing in {task.data['answer']}"


# -- code


def code_differing(tasks: Sequence[Task]) -> list[Case]:
    """The solution of another row, whose function has another name, and a function that returns None."""
    others = [Case(task, _of_another_name(task, [*tasks[at:], *tasks[:at]])) for at, task in enumerate(tasks, 1)]
    return others + [Case(task, nothing(task)) for task in tasks if not passes(task, nothing(task))]


def _of_another_name(task: Task, others: Sequence[Task]) -> str:
    solutions = (str(other.data["solution"]) for other in others)
    return next(text for text in solutions if not re.search(rf"^def {task.data['entry_point']}\b", text, re.MULTILINE))


def nothing(task: Task) -> str:
    """A function of the right name that returns None."""
    return f"def {task.data['entry_point']}(*args, **kwargs):\n    return None\n"


def passes(task: Task, source: str) -> bool:
    """Whether plain Python runs the row's prefix, the source and the tests together without an error."""
    prefix = task.data.get("prefix", "").rstrip()
    program = "\n".join([prefix and f"{prefix}\n    pass\n", source, task.data["tests"]])
    with contextlib.suppress(subprocess.TimeoutExpired):
        return not subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=30).returncode
    return False


def solution(task: Task) -> str:
    """The row's own reference."""
    return str(task.data["solution"])


def code_fault(task: Task) -> str:
    """Whether the reference fails its own tests under plain Python."""
    return "" if passes(task, solution(task)) else "the reference fails its own tests under plain Python"


# -- search


def first(task: Task) -> str:
    """The first of the row's answers."""
    return str(task.data["answers"][0])


def letters(task: Task) -> str:
    """The letters and digits of an answer, articles left out."""
    return re.sub(r"\b(?:a|an|the)\b|\W|_", "", first(task).lower())


def search_differing(tasks: Sequence[Task]) -> list[Case]:
    """The answers of two other rows."""
    return [Case(task, first(other)) for task, other in neighbours(tasks, letters)]


# -- the measurement

MATH = Kind("math", boxed, math_differing, math_fault)
CODE = Kind("code", solution, code_differing, code_fault)
SEARCH = Kind("search", first, search_differing, lambda task: "")
SOURCES = {
    "gsm8k": (MATH, real.gsm8k),
    "math": (MATH, real.competition),
    "humaneval": (CODE, real.humaneval),
    "mbpp": (CODE, real.mbpp),
    "hotpotqa": (SEARCH, real.hotpotqa),
}


def score(environment: str, cases: Sequence[Case], folder: Path) -> list[float | None]:
    """The rewards that `palaestra env score` gives the replies. Raises RuntimeError with its last words if it fails."""
    given, judged = folder / "replies.jsonl", folder / "judged.jsonl"
    rows = ({**task.data, "key": task.key, "prompt": task.prompt, "reply": reply} for task, reply in cases)
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(COMMAND), "env", "score", environment, "--input", str(given), "--output", str(judged)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"palaestra env score {environment} failed: {done.stderr.strip()[-500:]}")
    verdicts = [json.loads(line) for line in judged.read_text().splitlines()]
    if [verdict["key"] for verdict in verdicts] != [case.task.key for case in cases]:
        raise RuntimeError(f"palaestra env score {environment} did not judge every row, in order")
    return [verdict["reward"] for verdict in verdicts]


def measure_source(kind: Kind, tasks: Sequence[Task]) -> dict[str, Any]:
    """The figures of one source. `refused`: gold answers that are, though the reference is not at fault."""
    gold, differing = [Case(task, kind.gold(task)) for task in tasks], kind.differing(tasks)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        accepted = score(kind.environment, gold, Path(folder))
        others = score(kind.environment, differing, Path(folder))
    seconds = time.monotonic() - started
    faults = {task.key: kind.fault(task) for task, reward in zip(tasks, accepted, strict=True) if reward != 1}
    wrong = [reward is None or reward >= 0.5 for reward in others]
    return {
        "rows": len(tasks),
        "gold_accepted": accepted.count(1),
        "exceptions": {key: fault for key, fault in faults.items() if fault},
        "refused": [key for key, fault in faults.items() if not fault],
        "differing": len(differing),
        "differing_below_half": wrong.count(False),
        "differing_accepted": [_shown(case) for case, bad in zip(differing, wrong, strict=True) if bad][:20],
        "seconds": round(seconds, 1),
        "rows_per_second": round((len(gold) + len(differing)) / seconds),
    }


def _shown(case: Case) -> str:
    return f"{case.task.key}: {case.reply[:100]}"


def sound(figures: dict[str, Any]) -> bool:
    """Whether the figures of a source meet the bar."""
    few = len(figures["exceptions"]) <= EXCEPTIONS * figures["rows"]
    return few and not figures["refused"] and figures["differing_below_half"] == figures["differing"] > 0


def gold_rows() -> Measured:
    """Measure all sources."""
    figures = {name: measure_source(kind, list(rows())) for name, (kind, rows) in SOURCES.items()}
    return Measured(all(map(sound, figures.values())), figures)
