"""The judges: gold answers pass, attacks and hedges do not."""

from __future__ import annotations

import os
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from palaestra.environments.code import completed
from palaestra.environments.code_judge import judge, judge_in_one_process
from palaestra.environments.equivalence import equivalent
from palaestra.gym.registry import spec
from palaestra.gym.types import Task
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


@pytest.mark.parametrize("reply", [r"\boxed{\$15,\!000}", r"\boxed{15000}", "$15,000", r"\$15000"])
def test_currency_and_grouped_digits_are_a_number(reply: str) -> None:
    assert equivalent(r"\$15,\!000", reply)


@pytest.mark.parametrize(
    ("gold", "reply"),
    [("0,1", "1"), ("0,1", "01"), ("111", r"111, \! 111, \! 111"), ("25_{6}", "25_7"), ("-221_3", "-221_4")],
)
def test_a_list_is_no_number_and_a_base_is_compared(gold: str, reply: str) -> None:
    assert equivalent(gold, rf"\boxed{{{gold}}}")
    assert not equivalent(gold, rf"\boxed{{{reply}}}")


def test_a_type_crosses_to_the_reply_and_back() -> None:
    source = "def f(values, kind):\n    return [v for v in values if isinstance(v, kind)], kind"
    assert judge("assert f([1, 'a'], str) == (['a'], str)", "f", "", source).passed
    assert not judge("assert f([1, 'a'], int) == (['a'], str)", "f", "", source).passed
    assert not judge("f()", "f", "", "def f():\n    return type('int', (), {})").passed


def test_generated_references_pass() -> None:
    for task in islice(functions((1, 2, 3))("train", 0), 12):
        for expression in task.data["expressions"]:
            source = f"def f({task.data['parameters']}):\n    return {expression}"
            assert judge(task.data["tests"], "f", "", source).passed, (task.prompt, expression)


def _passes(task: Task) -> bool:
    data = task.data
    source = completed(data.get("prefix", ""), data["entry_point"], data["solution"])
    if data.get("one_process"):
        return judge_in_one_process(data["tests"], source).passed
    return judge(data["tests"], data["entry_point"], data.get("prefix", ""), source).passed


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_references_of_real_rows_pass(name: str) -> None:
    assert not [task.key for task in list(getattr(real, name)())[::20] if not _passes(task)]


@pytest.mark.parametrize("key", ["533", "596", "927"])
def test_rows_whose_tests_pass_a_type_or_need_an_import_or_a_class_of_the_reference(key: str) -> None:
    assert _passes(real.mbpp().get(key))


def test_rows_that_need_the_replys_own_classes_are_not_trained_on() -> None:
    own = [task for task in real.mbpp() if task.data["one_process"]]
    assert {task.key for task in own} >= {"601", "927"}
    assert not any(task.source.trainable for task in own)


@pytest.mark.parametrize("name", ["math", "code", "search"])
def test_the_page_names_every_field_of_a_row(name: str) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "verifiers.md").read_text()
    kind = spec(name).environment()
    sources = ["generator", *sys.modules[kind.__module__].SOURCES]
    tasks = [next(spec(name, {"source": source}).tasks("train", 0)) for source in sources]
    assert not {field for task in tasks for field in task.data if f"`{field}`" not in page}
