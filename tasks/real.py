"""Tasks of real data. Sources and licences: DATA.md."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palaestra.gym.tasksets import Rows, rows
from palaestra.gym.types import Source

DATA = Path(__file__).with_name("data")
Row = Mapping[str, Any]


def boxed_answer(solution: str) -> str:
    r"""The content of a solution's last \boxed{...} (or `\boxed x`)."""
    start = solution.rindex("\\boxed") + len("\\boxed")
    rest = solution[start:].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0]
    depth = 0
    for place, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[1:place]
    raise ValueError(f"the braces of \\boxed do not close in {rest[:60]!r}")


@functools.lru_cache(maxsize=1)
def gsm8k() -> Rows:
    """Grade-school word problems; `data`: answer."""
    return rows(
        DATA / "gsm8k_train.jsonl.gz",
        prompt="question",
        answer=lambda row: row["answer"].rpartition("####")[2].strip(),
        origin=Source(dataset="gsm8k", licence="MIT"),
    )


@functools.lru_cache(maxsize=1)
def competition() -> Rows:
    """MATH problems; `data`: answer in LaTeX, level, subject."""
    return rows(
        DATA / "math_test_minus_math500.jsonl.gz",
        prompt="problem",
        answer=lambda row: boxed_answer(row["solution"]),
        data={"level": "level", "subject": "type"},
        origin=Source(dataset="math", licence="MIT", note="rows of the MATH test set, less MATH-500"),
    )


@functools.lru_cache(maxsize=1)
def humaneval() -> Rows:
    """HumanEval; the prompt is a prefix that the reply continues or repeats."""
    return rows(
        DATA / "humaneval.jsonl.gz",
        prompt=lambda row: "Complete this Python function.\n\n" + row["prompt"],
        key="task_id",
        data={
            "prefix": "prompt",
            "entry_point": "entry_point",
            "tests": lambda row: f"{row['test']}\n\ncheck({row['entry_point']})\n",
            "solution": lambda row: row["prompt"] + row["canonical_solution"],
        },
        origin=Source(dataset="humaneval", licence="MIT", trainable=False, note="a benchmark"),
    )


def called(row: Row) -> str:
    """The function that an MBPP row's tests call: the first of their names that its reference defines."""
    defined = set(re.findall(r"^def\s+(\w+)", row["code"], re.MULTILINE))
    names = [name for name in re.findall(r"\b(\w+)\s*\(", row["test_list"][0]) if name in defined]
    if not names:
        raise ValueError(f"MBPP {row['task_id']}: its tests call no function of its reference")
    return str(names[0])


def _own_classes(row: Row) -> bool:
    """Whether the tests build objects of the reply's own classes, which cannot cross a process."""
    classes = re.findall(r"^class\s+(\w+)", row["code"], re.MULTILINE)
    return any(re.search(rf"\b{name}\b", _mbpp_tests(row)) for name in classes)


def _mbpp_tests(row: Row) -> str:
    """The tests, after the imports that they take from the reference."""
    lines = [row["test_setup_code"], *row["test_list"]]
    modules = re.findall(r"^import\s+(\w+)\s*$", row["code"], re.MULTILINE)
    needed = [f"import {name}" for name in modules if re.search(rf"\b{name}\.", "\n".join(row["test_list"]))]
    return "\n".join([*needed, *lines])


@functools.lru_cache(maxsize=1)
def mbpp() -> Rows:
    """MBPP; the prompt shows the first test, which names the function. Rows with `one_process` are not trained on."""
    origin = Source(dataset="mbpp", licence="CC-BY-4.0")
    found = rows(
        DATA / "mbpp.jsonl.gz",
        prompt=lambda row: f"{row['text']}\nYour code must pass this test:\n{row['test_list'][0]}",
        key="task_id",
        data={
            "entry_point": called,
            "tests": _mbpp_tests,
            "solution": "code",
            "one_process": _own_classes,
        },
        origin=origin,
    )
    barred = origin.model_copy(update={"trainable": False, "note": "judged in the reply's own process"})
    return Rows(task.model_copy(update={"source": barred}) if task.data["one_process"] else task for task in found)


@functools.lru_cache(maxsize=1)
def hotpotqa() -> Rows:
    """HotpotQA; `data`: answers, documents (title, line break, text)."""
    return rows(
        DATA / "hotpotqa_350.jsonl.gz",
        prompt="question_text",
        key="question_id",
        data={"answers": lambda row: row["answers_objects"][0]["spans"], "documents": _documents},
        origin=Source(dataset="hotpotqa", licence="CC-BY-SA-4.0", trainable=False, note="a development set"),
    )


def _documents(row: Row) -> list[str]:
    return [f"{paragraph['title']}\n{paragraph['paragraph_text']}" for paragraph in row["contexts"]]
