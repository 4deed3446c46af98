"""The judges: gold answers pass, attacks and hedges do not."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path

import pytest

from palaestra.environments.code import completed
from palaestra.environments.code_judge import judge, judge_in_one_process
from palaestra.environments.equivalence import equivalent
from palaestra.tasks import real
from palaestra.tasks.code import functions

TESTS = "assert f(1, 2) == 2\nassert f(3, 2) == 3"
ATTACKS = {
    "exit": "import os\nos._exit(0)",
    "system exit": "import sys\nsys.exit(0)",
    "exit in the call": "def f(a, b):\n    import os\n    os._exit(0)",
    "lying equality": "class E(int):\n    def __eq__(s, o): return True\ndef f(a, b): return E(0)",
    "patched builtins": "import builtins\nbuiltins.max = lambda *a: 1\ndef f(a, b): return 1",
    "printed verdict": "print('passed')",
    "memory": "x = [0] * 10**9\ndef f(a, b): return max(a, b)",
}


def test_a_right_function_passes() -> None:
    assert judge(TESTS, "f", "", "def f(a, b):\n    return max(a, b)").passed


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_earns_nothing(attack: str) -> None:
    assert not judge(TESTS, "f", "", attack).passed


def _sleepers(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found += [entry.name] if mark.encode() in (entry / "cmdline").read_bytes() else []
            except OSError:
                continue
    return found


def test_a_child_in_a_session_of_its_own_does_not_survive() -> None:
    mark = f"86{time.time_ns() % 10**6:06d}"
    escape = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\nf = max"
    assert judge(TESTS, "f", "", escape).passed
    assert not _sleepers(mark)


@pytest.mark.parametrize("reply", ["3, or maybe 4", r"\boxed{3} or \boxed{4}", "4"])
def test_a_hedge_or_a_wrong_number_earns_nothing(reply: str) -> None:
    assert not equivalent("3", reply)


def test_the_last_box_counts() -> None:
    assert equivalent(r"\frac{1}{2}", r"So it is \boxed{0.5}")


def test_generated_references_pass() -> None:
    for task in islice(functions((1, 2, 3))("train", 0), 12):
        for expression in task.data["expressions"]:
            source = f"def f({task.data['parameters']}):\n    return {expression}"
            assert judge(task.data["tests"], "f", "", source).passed, (task.prompt, expression)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_references_of_real_rows_pass(name: str) -> None:
    for task in list(getattr(real, name)())[::20]:
        data = task.data
        source = completed(data.get("prefix", ""), data["entry_point"], data["solution"])
        if data.get("one_process"):
            assert judge_in_one_process(data["tests"], source).passed, task.key
        else:
            assert judge(data["tests"], data["entry_point"], data.get("prefix", ""), source).passed, task.key
