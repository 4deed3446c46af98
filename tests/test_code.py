"""The judges of code, where replies are forked and where they run in boxes: right ones pass, hacks earn nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from boxes import IMAGES, ISOLATING, enforcing
from code_hacks import FUNCTIONS, LEAVES, LONG, PROGRAMS, SUITES

from palaestra.environments.code import Code, boxes, environment, forks, kinds
from palaestra.environments.code.environment import GENERATED, REAL
from palaestra.environments.code.kinds import filled, kind_of
from palaestra.environments.code.literal import predicted
from palaestra.gym.agent import Loop
from palaestra.gym.episode import run_episode
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policy import Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Destroyed
from palaestra.gym.types import Message, Sampling, Task, Unscored
from palaestra.tasks import real
from palaestra.tasks.code import functions

MAXIMUM = {"entry_point": "f", "tests": "assert f(1, 2) == 2\nassert f(3, 2) == 3"}
DOUBLE = {"cases": [{"stdin": f"{n}\n", "stdout": f"{2 * n}\n"} for n in (1, 7)]}
MUTANTS = ["x + 2", "x - 1 if x < 0 else x + 1", "x"]
SUCCESSOR = {
    "entry_point": "f",
    "right": "def f(x):\n    for _ in range(x): pass\n    return x + 1",
    "mutants": [f"def f(x): return {value}" for value in MUTANTS],
}
FINDING = "assert f(1) == 2\nassert f(-1) == 0"


class Judging:
    """Judges replies in one of the places where they may run."""

    def __init__(self, config, resources):
        self.config, self.resources = config, resources

    async def earned(self, data, reply):
        """What a reply earns, and its metric."""
        environment = Code(self.config, self.resources)
        return await environment.passes(Task(key="", prompt="", data=data), reply), environment.mutants_found()

    async def passes(self, data, reply):
        return (await self.earned(data, reply))[0] == 1


async def _open(name):
    config = Code.Config(backend=name, **({"image": IMAGES[name]} if name in IMAGES else {}))
    return Judging(config, await Code.open(config))


@pytest.fixture(params=["fork", *ISOLATING])
async def place(request):
    opened = await _open(request.param)
    yield opened
    await Code.shut(opened.resources)


def _each(hacks):
    slow = pytest.mark.slow
    return [pytest.param(hack, id=name, marks=[slow] if name in LONG else []) for name, hack in hacks.items()]


@pytest.mark.hack
@pytest.mark.parametrize("hack", _each(FUNCTIONS))
async def test_a_hack_of_a_function_earns_nothing(place, hack):
    assert not await place.passes(MAXIMUM, hack)


@pytest.mark.hack
@pytest.mark.parametrize("hack", _each(PROGRAMS))
async def test_a_hack_of_a_program_earns_nothing(place, hack):
    assert not await place.passes(DOUBLE, hack)


@pytest.mark.hack
@pytest.mark.parametrize("hack", _each(SUITES))
async def test_a_hack_of_tests_earns_nothing(place, hack):
    assert not await place.passes(SUCCESSOR, hack)


async def test_right_ones_pass(place):
    assert await place.passes(MAXIMUM, "def f(a, b):\n    return max(a, b)")
    assert await place.passes(DOUBLE, "def main():\n    print(2 * int(input()))\nif __name__ == '__main__': main()")
    assert await place.passes(
        DOUBLE, "import sys, threading\nthreading.Thread(target=lambda: print(2 * int(sys.stdin.read()))).start()"
    )
    assert await place.passes(
        DOUBLE, "import sys\nfor line in sys.stdin:\n    print(f'{2 * int(line)}  \\n')\nsys.exit()"
    )
    assert await place.earned(SUCCESSOR, FINDING) == (1, 1)
    assert await place.earned(
        SUCCESSOR, f"```python\ndef test_it():\n    {FINDING.replace(chr(10), chr(10) + '    ')}\n```"
    ) == (1, 1)


async def test_tests_that_find_some_mutants_earn_nothing_but_the_metric_says_how_many(place):
    assert await place.earned(SUCCESSOR, "assert f(1) == 2") == (0, pytest.approx(2 / 3))


async def test_what_a_reply_leaves_behind_no_later_one_finds(place):
    finds = "import os\ndef f(a, b):\n    return max(a, b) if not os.path.exists('/tmp/left') else None"
    assert not await place.passes(MAXIMUM, LEAVES)
    assert await place.passes(MAXIMUM, finds)
    clean = {"cases": [{"stdin": "", "stdout": "False"}] * 3}
    assert await place.passes(clean, "import os\nprint(os.path.exists('/tmp/left'))\n" + LEAVES)


async def test_a_type_crosses_to_the_reply_and_back_and_what_it_does_to_arguments_is_seen(place):
    source = "def f(values, kind):\n    return [v for v in values if isinstance(v, kind)], kind"
    right = {"entry_point": "f", "tests": "assert f([1, 'a'], str) == (['a'], str)"}
    assert await place.passes(right, source)
    assert not await place.passes({**right, "tests": "assert f([1, 'a'], int) == (['a'], str)"}, source)
    assert not await place.passes({**right, "tests": "f()"}, "def f():\n    return type('int', (), {})")
    assert await place.passes({**right, "tests": "x = [2, 1]\nf(x)\nassert x == [1, 2]"}, "f = list.sort")


async def test_an_exception_of_the_reply_is_the_tests_to_see_and_its_death_is_not(place):
    wants = {
        "entry_point": "f",
        "tests": "try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError",
    }
    assert await place.passes(wants, "def f(x): raise ValueError('no')")
    assert await place.passes(wants, "class No(Exception): pass\ndef f(x): raise No")
    for dead in ("os._exit(0)", "os.kill(os.getpid(), 9)", "raise SystemExit"):
        assert not await place.passes(wants, f"import os\ndef f(x): {dead}")


def _sleepers(mark):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found += [entry.name] if mark.encode() in (entry / "cmdline").read_bytes() else []
            except OSError:
                continue
    return found


async def test_a_child_in_a_session_of_its_own_does_not_survive(place):
    mark = f"86{time.time_ns() % 10**6:06d}"
    escape = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\nf = max"
    assert await place.passes(MAXIMUM, escape)
    assert not _sleepers(mark)


@pytest.mark.parametrize("source", [*GENERATED, *REAL])
async def test_gold_earns_all_and_nothing_earns_nothing(place, source):
    tasks = REAL[source]() if source in REAL else islice(GENERATED[source]((1, 2, 3, 4))("train", 5), 4)
    for task in list(tasks)[:: 40 if source in REAL else 1]:
        environment = Code(place.config, place.resources)
        assert await place.passes(task.data, environment.solution(task)), task.key
        assert not await place.passes(task.data, ""), task.key


async def test_generated_references_pass_in_every_way_of_writing():
    place = await _open("fork")
    for task in islice(functions((1, 2, 3))("train", 0), 12):
        for expression in task.data["expressions"]:
            source = f"def f({task.data['parameters']}):\n    return {expression}"
            assert await place.passes(task.data, source), (task.prompt, expression)


@pytest.mark.parametrize("key", ["533", "596", "927"])
async def test_rows_whose_tests_pass_a_type_or_need_an_import_or_a_class_of_the_reference(place, key):
    task = real.mbpp().get(key)
    assert await place.passes(task.data, task.data["solution"])


def test_rows_that_need_the_replys_own_classes_are_not_trained_on():
    own = [task for task in real.mbpp() if task.data["one_process"]]
    assert {task.key for task in own} >= {"601", "927"}
    assert not any(task.source.trainable for task in own)


# -- infilling


PREFIX, SUFFIX = "def f(xs):\n    total = 0\n    ", "\n    return total\n"
MIDDLE = "for x in xs:\n        total += x"


@pytest.mark.parametrize(
    "reply",
    [
        MIDDLE,
        f"    {MIDDLE}\n",
        f"```python\n    {MIDDLE}\n```",
        PREFIX + MIDDLE + SUFFIX,
        f"```\n{PREFIX}{MIDDLE}{SUFFIX}```",
    ],
)
async def test_the_middle_or_the_whole_program_fills_a_gap(reply):
    place = await _open("fork")
    data = {"entry_point": "f", "tests": "assert f([1, 2]) == 3", "prefix": PREFIX, "suffix": SUFFIX}
    assert await place.passes(data, reply)
    assert not await place.passes(data, reply.replace("+= x", "-= x"))


def test_a_middle_that_begins_like_the_prefix_is_no_whole_program():
    assert filled("x = 1\n", "\nprint(x)\n", "x = 1") == "x = 1\nx = 1\nprint(x)\n"


# -- prediction


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("[1, 2]", "[1,2]"),
        ("[1, 2]", "assert f(3) == [1, 2]"),
        ("[1, 2]", "It doubles.\n```python\n[1, 2]\n```"),
        ("[1, 2]", "It doubles.\n\n`[1, 2]`"),
        ("{'a': (1, None), 'b': {1.5, b'x'}}", "{\n 'b': {b'x', 1.5},\n 'a': (1, None)}"),
        ("-3", "- 3"),
    ],
)
def test_a_right_value_in_any_spelling(answer, reply):
    assert predicted(answer, reply)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("1", "True"),
        ("1", "1.0"),
        ("[1]", "(1,)"),
        ("[1]", "[True]"),
        ("{1: 2}", "{1.0: 2}"),
        ("'a'", "b'a'"),
        ("1", "1\n2"),
        ("1", "```\n1\n```\n```\n2\n```"),
        ("1", "1 or 2"),
        ("1", "1, 2"),
        ("1", "{1, 2}"),
        ("1", "f(1)"),
        ("1", "__import__('os').getpid()"),
        ("1", ""),
        ("1", "The answer is 1"),
        ("1", "1" * 10_000),
    ],
)
def test_a_wrong_value_a_hedge_or_an_expression(answer, reply):
    assert not predicted(answer, reply)


def test_numbers_are_equal_where_the_task_says_so():
    assert predicted("[1, 2.5]", "[1.0, 2.5]", equal_numbers=True)
    assert not predicted("1", "True", equal_numbers=True)


BOMBS = [
    "(" * 100_000,
    "(" * 9_000,
    "-" * 19_000 + "1",
    "[" * 150 + "]" * 150,
    "not " * 4_000 + "1",
    "{1:" * 90 + "1" + "}" * 90,
    "1" + "+1" * 9_000,
    "a" + ".a" * 9_000,
    "x if x else " * 1_500 + "1",
    "lambda:" * 2_500 + "1",
    "9**" * 6_000 + "9",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda text: text[:8])
def test_a_deep_literal_does_not_kill_its_reader(bomb):
    code = f"from palaestra.environments.code.literal import predicted\nprint(predicted('1', {bomb!r}))"
    done = subprocess.run([sys.executable, "-P", "-"], input=code, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr[-300:]


# -- rows of one's own


OWN = {
    "functions": {**MAXIMUM, "solution": "f = max"},
    "stdio": {**DOUBLE, "solution": "print(2 * int(input()))"},
    "infilling": {
        "entry_point": "f",
        "tests": "assert f(1) == 1",
        "prefix": "def f(x):\n",
        "suffix": "",
        "solution": "    return x",
    },
    "prediction": {"answer": "[1]"},
    "repair": {**MAXIMUM, "kind": "repair", "solution": "f = max"},
    "testwriting": {**SUCCESSOR, "solution": FINDING},
}


@pytest.mark.parametrize("kind", OWN)
async def test_a_row_says_of_what_kind_it_is(tmp_path, kind):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Do it.", "remark": "mine", **OWN[kind]}) + "\n")
    (task,) = Code.task_set(Code.Config(source=str(tmp_path / "own.jsonl")))
    assert kind_of(task.data) == task.data["kind"] == kind
    assert "remark" not in task.data
    assert await (await _open("fork")).passes(task.data, Code().solution(task))


def test_a_row_that_fits_no_kind_is_refused_by_its_number(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "tests": "assert f()"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"row 2: a code task has the columns of stdio \(cases\) or .*this one has prompt, tests"
    ):
        Code.task_set(Code.Config(source=str(tmp_path / "own.jsonl")))
    with pytest.raises(ValueError, match="no kind of code task 'riddle'"):
        kind_of({"kind": "riddle"})


# -- configuration, and the machine's faults


async def test_a_backend_that_isolates_nothing_and_a_key_without_effect_are_refused():
    with pytest.raises(UsageError, match="process does not enforce isolation, no_network"):
        await Code.open(Code.Config(backend="process"))
    with pytest.raises(ValueError, match="image has no effect with backend fork"):
        Code.Config(image="mine")


def _episode(environment, data, reply):
    policy = Replay([Message(role="assistant", content=reply)])
    return run_episode(environment, Loop(), {"main": policy}, Task(key="k", prompt="", data=data), Sampling(), "id")


LOST = Failure(Cause.SANDBOX, "injected: killed from outside")


class Losing:
    """A sandbox whose first boxes are lost when they are asked, for a reason."""

    def __init__(self, sandbox, times, reason):
        self.sandbox, self.left, self.reason = sandbox, times, reason

    async def create(self, image, limits):
        box = await self.sandbox.create(image, limits)
        self.left -= 1
        if self.left >= 0:
            box.ask = self._lost
        return box

    async def _lost(self, *_):
        raise self.reason


@pytest.mark.parametrize("name", ISOLATING)
async def test_a_box_that_the_machine_lost_is_never_a_zero_even_if_others_work(name):
    place = await _open(name)
    try:
        losing = Code(place.config, Losing(place.resources, 1, LOST))
        lost = await _episode(losing, {**MAXIMUM, "solution": "f = max"}, "f = max")
        assert lost.outcome.cause is Cause.SANDBOX
        assert isinstance(lost.result, Unscored)
    finally:
        await Code.shut(place.resources)


@pytest.mark.parametrize("name", ISOLATING)
async def test_a_box_that_the_reply_brought_down_earns_nothing(name):
    place = await _open(name)
    try:
        downed = Code(place.config, Losing(place.resources, 99, Destroyed("out of memory")))
        episode = await _episode(downed, {**MAXIMUM, "solution": "f = max"}, "f = max")
        assert episode.outcome.cause is Cause.OK
        assert episode.result.value == 0
    finally:
        await Code.shut(place.resources)


HOARD = """
import os
for _ in range(3):
    os.fork()
hoard = bytearray(60 << 20)
f = max
"""


@pytest.mark.parametrize("name", enforcing("memory"))
async def test_the_processes_of_a_box_have_so_much_memory_together(name, monkeypatch):
    place = await _open(name)
    try:
        assert await place.passes(MAXIMUM, "f = max")
        monkeypatch.setattr(boxes, "LIMITS", boxes.LIMITS.model_copy(update={"memory": 64 << 20}))
        assert not await place.passes(MAXIMUM, HOARD)
    finally:
        await Code.shut(place.resources)


ORDINARY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import server
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
server._libc.prctl(4, 1, 0, 0, 0)  # dumpable, as who was never root is
assert server.leave_namespaces(), "refused"
if os.fork() == 0:
    server._see_own_processes_alone()
    server._give_up_user(1)
    try:
        os.kill(-1, 9)
        print("killed others")
    except ProcessLookupError:
        pass
    for place in ("/run/lock/left", "/var/lock/left", sys.argv[2] + "/left"):
        try:
            open(place, "w")
            print("wrote", place)
        except OSError:
            pass
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
    hidden = server.HIDDEN[0]
    print(int(status["CapEff"], 16), os.path.isdir(hidden) and os.listdir(hidden) or [], flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user on")
def test_an_ordinary_users_reply_finds_nobody_and_writes_nowhere(tmp_path):
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ORDINARY, str(forks.SCRIPT.parent), str(tmp_path)], capture_output=True, text=True
    )
    if "refused" in done.stderr:
        pytest.skip("ordinary users may make no namespaces here")
    assert done.stdout == "0 []\n", done.stderr


def test_where_nothing_contains_a_reply_that_is_said(monkeypatch):
    monkeypatch.setattr(environment, "contained", lambda: False)
    with pytest.warns(UserWarning, match="limits and nothing more"):
        asyncio.run(Code.open(Code.Config()))


def test_rows_that_run_in_one_process_with_their_tests_are_not_trained_on(tmp_path):
    row = {"prompt": "f?", "entry_point": "f", "tests": "assert f() == 1"}
    lines = [json.dumps(row), json.dumps({**row, "prompt": "g?", "one_process": True})]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert [task.source.trainable for task in kinds.own(str(tmp_path / "own.jsonl"))] == [True, False]
