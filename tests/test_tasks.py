"""The tasks: rows load, generators are deterministic, distinct and split without overlap."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest

from palaestra.gym.types import Task
from palaestra.tasks import code, pipelines, real, repair
from palaestra.tasks.code import functions
from palaestra.tasks.math import word_problems
from palaestra.tasks.search import lookups

ROWS = {"gsm8k": 7473, "competition": 4500, "humaneval": 164, "mbpp": 474, "hotpotqa": 350}


def content(task: Task) -> str:
    """What the split is a hash of."""
    return json.dumps([task.prompt, task.data], sort_keys=True)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_loads(name: str) -> None:
    assert len(getattr(real, name)()) == ROWS[name]


def test_benchmarks_are_not_trained_on() -> None:
    assert not any(task.source.trainable for task in [*real.humaneval(), *real.hotpotqa()])


CODE = [code.programs, code.gaps, code.predictions, code.repairs, code.suites]


@pytest.mark.parametrize("make", [word_problems, functions, lookups, repair.small, *CODE])
def test_splits_are_disjoint_and_keys_find_their_tasks(make) -> None:  # type: ignore[no-untyped-def]
    tasks = make((2, 3))
    train, held = (list(islice(tasks(split, 1), 200)) for split in ("train", "held-out"))
    # a look-up's answer hangs on its documents too, so the content is prompt and data
    assert not {content(task) for task in train} & {content(task) for task in held}
    assert all(tasks.get(task.key) == task for task in train)
    assert len({content(task) for task in train}) > 190


def test_pipelines_of_the_first_level_are_more_than_a_million():
    of_a_step = sum(high - low + 1 for *_, (low, high) in pipelines.STEPS)
    assert of_a_step**2 * len(pipelines.RESULTS) > 10**6
    assert of_a_step**2 * len(code.PRINTED) * len(code.READ) > 10**6


@pytest.mark.parametrize("make", CODE)
def test_prompts_of_pipelines_seldom_repeat(make):
    assert len({task.prompt for task in islice(make((1,))("train", 0), 400)}) > 380


def _passes(files: dict[str, str], tests: str) -> bool:
    space: dict[str, Any] = {}
    exec(files["small.py"] + tests.replace("from small import f", ""), space)
    try:
        space["test_f"]()
    except (AssertionError, ZeroDivisionError):
        return False
    return True


@pytest.mark.parametrize("level", [1, 2, 3])
def test_small_repairs_fail_their_tests_and_their_solutions_pass(level):
    for task in islice(repair.small((level,))("train", 0), 300):
        tests = task.data["tests"]["test_small.py"]
        assert (_passes(task.data["files"], tests), _passes(task.data["solution"], tests)) == (False, True)
