"""`env check`: a sound environment passes; each deliberately broken one fails with a line that names the fault."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import jsonschema
import pytest

from palaestra.gym import leftovers
from palaestra.gym.check import CHECKS, check
from palaestra.gym.fuzz import valid_calls
from palaestra.gym.leftovers import holdings, marked
from palaestra.gym.registry import UsageError, spec

SOUND = '''
import asyncio, itertools, os, random, subprocess, threading, time
from pydantic import BaseModel
from palaestra.gym.environment import Environment, ToolError, reward, tool
from palaestra.gym.types import Message, Task, ToolCall

def tasks(split, seed):
    draw = random.Random(f"{split} {seed}")
    for n in range(50):
        number = draw.randrange(10**6)
        yield Task(key=f"{n}-{number}", prompt=f"Double {number}.", data={"number": number, "answer": str(2 * number)})

COUNT = itertools.count()

class Doubling(Environment):
    tasks = tasks
    kept = []

    @tool
    def double(self, number: int) -> int:
        """Double a number."""
        return 2 * number

    @reward
    def correct(self, task, answer) -> float:
        return float(answer == task.data["answer"])

    def solution(self, task):
        call = ToolCall(id="", name="double", arguments='{"number": %d}' % task.data["number"])
        return [Message(role="assistant", tool_calls=(call,)), Message(role="assistant", content=task.data["answer"])]
'''

BROKEN = {
    "a tool's parameter has no type": (
        "tools",
        "the tool double: its parameter number has no type; annotate it (number: str)",
        """
    @tool
    def double(self, number):
        return 2 * int(number)
""",
    ),
    "a tool has no docstring": (
        "tools",
        "the tool double has no docstring",
        """
    @tool
    def double(self, number: int) -> int:
        return 2 * number
""",
    ),
    "the solution is a number": (
        "gold",
        "(int); return a str, a Message, or a list of them",
        """
    def solution(self, task):
        return 2 * task.data["number"]
""",
    ),
    "gold fails": (
        "gold",
        "gold earned 0, not the full 1",
        """
    @reward
    def correct(self, task, answer) -> float:
        return float(answer == "something else")
""",
    ),
    "null is right": (
        "null",
        "an empty reply earned the full 1",
        """
    @reward
    def correct(self, task, answer) -> float:
        return float(answer in ("", task.data["answer"]))
""",
    ),
    "anything is right": (
        "differing gold",
        "the gold of another task earned the full 1",
        """
    @reward
    def correct(self, task, answer) -> float:
        return float(answer != "")
""",
    ),
    "reward differs on repeat": (
        "repeat",
        "reward correct was",
        """
    @reward
    def correct(self, task, answer) -> float:
        return float(answer == task.data["answer"]) + next(COUNT) * 0.01
""",
    ),
    "tasks differ on repeat": (
        "repeat",
        "tasks of split train, seed 0 differ",
        """
    @classmethod
    def task_set(cls, config):
        return lambda split, seed: tasks(split, next(COUNT))
""",
    ),
    "tool hangs": (
        "gold",
        "tool Doubling.double did not finish within 0.5 s",
        """
    @tool
    def double(self, number: int) -> int:
        time.sleep(5)
        return 2 * number
""",
    ),
    "tool raises": (
        "fuzzed tools",
        "tool Doubling.double raised OverflowError",
        """
    @tool
    def double(self, number: int) -> int:
        if abs(number) > 2**40:
            raise OverflowError("too big")
        return 2 * number
""",
    ),
    "malformed reply raises": (
        "malformed replies",
        "raised ValueError",
        """
    @reward
    def correct(self, task, answer) -> float:
        return float(bool(answer) and int(answer) == 2 * task.data["number"])
""",
    ),
    "state is shared": (
        "isolation",
        "state is shared between episodes",
        """
    def setup(self, task):
        type(self).current = task

    @reward
    def correct(self, answer) -> float:
        return float(answer == type(self).current.data["answer"])
""",
    ),
    "close is not idempotent": (
        "close",
        "close is not idempotent: a second call: Doubling.close raised RuntimeError: closed already",
        """
    shut_before = False

    def close(self):
        if self.shut_before:
            raise RuntimeError("closed already")
        self.shut_before = True
""",
    ),
    "close hangs": (
        "close",
        "Doubling.close did not finish within 0.5 s",
        """
    async def close(self):
        await asyncio.sleep(60)
""",
    ),
    "close needs setup": (
        "close",
        "one before setup",
        """
    def setup(self, task):
        self.handle = object()

    def close(self):
        assert self.handle
""",
    ),
    "a tool leaks a process": (
        "leftovers",
        "a finished episode leaves behind: process",
        """
    @tool
    def double(self, number: int) -> int:
        subprocess.Popen(["setsid", "sleep", "60"])
        return 2 * number
""",
    ),
    "a tool leaks a file": (
        "leftovers",
        "open files",
        """
    @tool
    def double(self, number: int) -> int:
        os.open("/dev/null", os.O_RDONLY)
        return 2 * number
""",
    ),
    "a tool leaks a thread": (
        "leftovers",
        "threads",
        """
    @tool
    def double(self, number: int) -> int:
        threading.Thread(target=time.sleep, args=(20,), daemon=True, name="mine").start()
        return 2 * number
""",
    ),
    "a cancelled episode leaks": (
        "cancelled",
        "a cancelled episode leaves behind: process",
        """
    @tool
    def double(self, number: int) -> int:
        self.box = subprocess.Popen(["sleep", "60"])
        return 2 * number

    @reward
    def correct(self, task, answer) -> float:
        self.box and (self.box.kill(), self.box.wait())
        return float(answer == task.data["answer"])

    box = None
""",
    ),
    "a tool hides that its backend is down": (
        "faults",
        "tool double unavailable came out as ok",
        """
    def __setattr__(self, name, value):
        if name != "double":
            super().__setattr__(name, value)
""",
    ),
    "shut leaves a process": (
        "shut",
        "after shut() is left: process",
        """
    @classmethod
    async def open(cls, config):
        return subprocess.Popen(["sleep", "60"])
""",
    ),
}


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(leftovers, "GRACE", 0.5)


def write(tmp_path, body: str = "") -> str:
    path = tmp_path / "doubling.py"
    path.write_text(SOUND + body)
    return str(path)


async def test_a_sound_environment_passes_every_check(tmp_path):
    seen = []
    findings = await check(spec(write(tmp_path)), 4, 2.0, seen.append)
    assert [finding.message for finding in findings if finding.message] == []
    assert [finding.check for finding in findings] == [*CHECKS, "shut"]
    assert seen == findings


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_environment_fails_with_the_name_of_its_fault(name, tmp_path):
    expected, text, body = BROKEN[name]
    findings = await check(spec(write(tmp_path, body)), 3, 0.5)
    faults = {}
    for finding in findings:
        if not finding.ok:
            assert "\n" not in finding.message
            faults.setdefault(finding.check, []).append(finding.message)
    assert expected in faults, faults
    assert any(text in message for message in faults[expected]), faults


async def test_an_environment_without_gold_or_tools_is_checked_as_far_as_it_goes():
    findings = await check(spec("gymnasium:CartPole-v1"), 2, 5.0)
    assert all(finding.ok for finding in findings)
    assert {finding.check for finding in findings if finding.skipped} == {
        "gold",
        "differing gold",
        "fuzzed tools",
        "isolation",
    }


async def test_an_environment_that_cannot_open_is_named(tmp_path):
    body = "\n    @classmethod\n    async def open(cls, config):\n        raise OSError('no index')\n"
    with pytest.raises(UsageError, match=r"open\(\) raised OSError: no index"):
        await check(spec(write(tmp_path, body)))


async def test_an_environment_without_a_reward_is_named_and_checked_to_the_end(tmp_path):
    path = tmp_path / "mute.py"
    path.write_text(SOUND.replace("    @reward\n", ""))
    findings = await check(spec(str(path)), 2, 2.0)
    messages = {finding.check: finding.message for finding in findings}
    assert "has no @reward" in messages["gold"]
    assert messages["differing gold"] == "skipped: the environment has no @reward of positive weight"
    assert not [message for message in messages.values() if "full 0" in message or "no solution" in message]
    assert findings[-1].check == "shut"


async def test_a_solution_that_raises_is_named(tmp_path):
    findings = await check(spec(write(tmp_path, "\n    def solution(self, task):\n        return task.data['gold']\n")))
    messages = {finding.check: finding.message for finding in findings}
    assert f"solution(task) raised KeyError: gold ({tmp_path}/doubling.py, line " in messages["gold"]
    assert messages["isolation"] == "skipped: solution(task) is at fault"


def test_fuzzed_arguments_fit_their_schema():
    schema = {
        "type": "object",
        "required": ["n", "items", "kind"],
        "$defs": {"Kind": {"enum": ["a", "b"]}},
        "properties": {
            "n": {"type": "integer", "minimum": -5, "maximum": 9},
            "x": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "items": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 2, "maxLength": 5}},
            "kind": {"$ref": "#/$defs/Kind"},
            "flag": {"type": "boolean"},
            "fixed": {"const": 3},
        },
    }
    tool = {"type": "function", "function": {"name": "t", "description": "", "parameters": schema}}
    calls = [message.tool_calls[0] for message in valid_calls(tool, 100, seed=1)]
    assert len({call.arguments for call in calls}) > 50
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schema)


def _gone(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_holdings_see_processes_that_left_the_tree_threads_and_files():
    with marked() as mark:
        before = holdings(mark)
        subprocess.run(["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &"], check=True)
        done = threading.Event()
        thread = threading.Thread(target=done.wait, name="mine")
        thread.start()
        descriptor = os.open("/dev/null", os.O_RDONLY)
        time.sleep(0.2)
        lines = holdings(mark).beyond(before).named(1)
        os.close(descriptor)
        done.set()
        thread.join()
        assert [line.split()[0] for line in lines] == ["process", "1", "1"]
        assert "sleep 60" in lines[0]
        pid = int(lines[0].split()[1])
    time.sleep(0.2)
    assert _gone(pid)
