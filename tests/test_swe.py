"""Repair tasks: edits that change what a program means, a build that admits only real bugs, a verifier that is not fooled."""

from __future__ import annotations

import ast
import asyncio
import gzip
import json
import random
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.environments.sandbox.backends import lacks_native, open_backend
from palaestra.environments.swe import build, environment, packages, repository
from palaestra.environments.swe.build import LIMITS, function_of, with_clocks
from palaestra.environments.swe.copies import copies_in
from palaestra.environments.swe.environment import Built, Swe
from palaestra.environments.swe.issues import issue
from palaestra.environments.swe.mutations import OPERATORS, Edit, applied, edits
from palaestra.environments.swe.tests_run import placed, run, site
from palaestra.environments.swe.verify import Expected, repair, repaired, sentinels
from palaestra.gym.agent import Loop
from palaestra.gym.environment import ToolError, gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.policies import Null
from palaestra.gym.policy import Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Entry
from palaestra.gym.types import Message, Sampling, Task

boxed = pytest.mark.skipif(bool(lacks_native()), reason="no native sandbox on this machine")
SOURCE = '''
def clamp(value, low, high):
    """A value between two bounds."""
    if value < low:
        return low
    if value > high:
        return high
    return value


def total(numbers, start=0):
    result = start
    for number in numbers:
        if number is None:
            continue
        result += number
    return result


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def top(self, default=None):
        if not self.items:
            return default
        else:
            return self.items[-1]

    def both(self, a, b):
        return bool(a) and bool(b), max(a, b), self.items[1:]
'''
TESTS = """
import unittest

import pytest
from small import *


@pytest.mark.parametrize(("value", "found"), [(-1, 0), (0, 0), (5, 5), (10, 10), (11, 10)])
def test_clamp(value, found):
    assert clamp(value, 0, 10) == found


def test_total():
    assert total([1, None, 2], 3) == 6


def test_stack():
    stack = Stack()
    assert stack.top(7) == 7
    stack.push(1)
    stack.push(2)
    assert stack.top() == 2
    assert stack.both(3, 0) == (False, 3, [2])


def test_always():
    assert True


class TestMore(unittest.TestCase):
    def test_bounds(self):
        for value in (5, 12):
            with self.subTest(value=value):
                self.assertEqual(clamp(value, 0, 10), min(value, 10))


def test_elsewhere():
    pytest.skip("needs another machine")


@pytest.mark.xfail
def test_to_be_repaired():
    assert total([]) == 1
"""
SMALL = repository.Repository({"small/__init__.py": SOURCE.encode()}, {"tests/test_small.py": TESTS.encode()}, ".", ("tests",), ("small/__init__.py",))  # fmt: skip
SKIPS = 2
"""How many of the tests are skipped, or fail as they are marked to."""
NAMED = Expected(
    ("tests/test_small.py::test_total",),
    ("tests/test_small.py::test_stack", "tests/test_small.py::test_clamp[5-5]", "tests/test_small.py::TestMore::test_bounds", "tests/test_small.py::test_to_be_repaired"),
    SKIPS,
)  # fmt: skip
ALONE_TESTS = {
    "tests/test_single.py": """
import unittest

from single import double


def test_callable():
    assert callable(double)


class TestDouble(unittest.TestCase):
    def test_double(self):
        self.assertEqual(double(4), 8)
""",
    "tests/test_beside.py": "def test_beside(): pass\n",
}
ALONE = repository.repository({"files": {"single.py": "double = lambda x: x + 3\n"}, "tests": ALONE_TESTS})
PACKAGE = packages.Package("small", "1", "", "Apache-2.0", "small", ("tests",))


def test_every_operator_finds_something_and_every_edit_means_something_else():
    found = edits(SOURCE)
    kinds = {edit.kind for edit in found}
    assert len(kinds) >= 10
    assert kinds <= {operator.__name__ for operator in OPERATORS}
    whole = ast.dump(ast.parse(SOURCE))
    for edit in found:
        changed = applied(SOURCE, [edit])
        assert ast.dump(ast.parse(changed)) != whole
        assert changed[: edit.start] == SOURCE[: edit.start]
        assert changed.endswith(SOURCE[edit.end :])
    assert {edit.function for edit in found} >= {"clamp", "total", "Stack.top", "Stack.both"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_edits_apart_can_be_combined_in_any_order_and_overlapping_ones_cannot(seed):
    r = random.Random(seed)
    one, two = r.sample(edits(SOURCE), 2)
    if one.end < two.start or two.end < one.start:
        assert applied(SOURCE, [one, two]) == applied(SOURCE, [two, one])
    elif one.start < two.end and two.start < one.end:
        with pytest.raises(ValueError, match="overlap"):
            applied(SOURCE, [one, two])


def test_places_are_counted_in_characters():
    text = "def f(a):\n    x = 'grüße'; return a < 'é'\n"
    (edit,) = [edit for edit in edits(text) if edit.kind == "flip_comparison"]
    assert applied(text, [edit]) == "def f(a):\n    x = 'grüße'; return a <= 'é'\n"


def test_an_issue_tells_more_on_easier_levels():
    chosen = [("a.py", Edit("k", "Stack.top", 0, 1, ""))]
    failures = {"tests/t.py::TestX::test_big_numbers[3]": "x\nE   assert 1 == <A at 0x7f12>\n"}
    easy, middle, hard = (issue("small", level, chosen, failures) for level in (1, 2, 3))
    assert "`Stack.top` (a.py)" in easy
    assert "big numbers (3)" in hard
    assert "assert 1 == <A>" in middle
    assert "assert" not in hard
    assert "Stack.top" not in middle


def test_only_sources_are_taken_of_a_repair():
    file = Entry("file", 0o644, b"x = 1\n")
    names = {
        "small/__init__.py": file, "small/new.py": file, "small/conftest.py": file, "tests/test_small.py": file,
        "pytest.ini": file, "sitecustomize.py": file, "small/link.py": Entry("link", 0o777, b"/etc/passwd"),
        "small/huge.py": Entry("file", 0o644, b"#" * 500_000), ".git/config": file, "small/__pycache__/x.pyc": file,
    }  # fmt: skip
    changes = {f"/work/repo/{name}": entry for name, entry in names.items()} | {"/etc/x": file}
    assert repair(SMALL, changes) == {"small/__init__.py": b"x = 1\n", "small/new.py": b"x = 1\n"}
    assert repair(SMALL, {"/work/repo/small/__init__.py": None, "/work/repo/small/gone.txt": None}) == {"small/__init__.py": None}  # fmt: skip


def test_new_modules_that_would_stand_in_the_place_of_others_are_not_taken():
    file = Entry("file", 0o644, b"x = 1\n")
    names = ["json.py", "_pytest.py", "pytest.py", "pluggy.py", "iniconfig.py", "packaging.py", "pygments.py", "py.py", "palaestra_plugin.py", "pytest/__init__.py", "conftest.py", "setup.py", "usercustomize.py"]  # fmt: skip
    assert repair(ALONE, {f"/work/repo/{name}": file for name in (*names, "helper.py")}) == {"helper.py": b"x = 1\n"}
    there = ALONE._replace(files={"types.py": b""}, sources=("types.py",))
    assert repair(there, {"/work/repo/types.py": file}) == {"types.py": b"x = 1\n"}


@pytest.mark.parametrize(
    "wanted", [(), ("tests/test_small.py::TestMore::test_bounds", "tests/test_small.py::test_clamp[5-5]")]
)
def test_sentinels_differ_each_time_resemble_real_tests_and_do_what_they_say(wanted):
    one, two = sentinels(SMALL, wanted), sentinels(SMALL, wanted)
    assert one.text != two.text
    assert one.path.startswith("tests/test_small_")
    names = {name.rpartition("::")[2] for name in one.failing}
    assert names & {"test_bounds", "test_clamp"} if wanted else any(f"def {name}(" in TESTS for name in names)
    assert all(f"def test_{name.rpartition('::')[2].split('_')[1]}" in TESTS for name in one.passing)
    scope: dict = {}
    exec(one.text, scope)
    for name in one.passing:
        scope[name.rpartition("::")[2]]()
    for name in one.failing:
        with pytest.raises(AssertionError):
            scope[name.rpartition("::")[2]]()


def test_a_package_that_is_not_what_was_pinned_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages, "_download", lambda package: b"something else")
    with pytest.raises(UsageError, match="another sha256"):
        packages.fetched(packages.PACKAGES[0])
    assert not list(tmp_path.rglob("*.gz"))
    with pytest.raises(UsageError, match="the packages are"):
        repository.find("nothing")


@pytest.fixture
async def backend():
    opened = await Swe.open(Swe.Config(source="small"))
    yield opened
    await Swe.shut(opened)


@pytest.fixture
def small(monkeypatch):
    """A package of our own in the place of those of the index."""
    monkeypatch.setattr(repository, "PACKAGES", (PACKAGE,))
    monkeypatch.setattr(repository, "files", lambda package: {**SMALL.files, **SMALL.tests})
    repository.whole.cache_clear()
    yield
    repository.whole.cache_clear()


@boxed
@pytest.mark.slow
async def test_what_a_task_breaks_lies_nowhere_else_in_the_box(tmp_path):
    backend = open_backend("native")
    box = await backend.create("host", LIMITS)
    try:
        module, package = (
            repository.whole("jsonpointer").files["jsonpointer.py"],
            repository.whole("toolz").files["toolz/functoolz.py"],
        )
        await box.write("/opt/jsonpointer.py", module[500:])
        await box.write("/opt/deep/toolz/functoolz.py", package)
        await box.write("/opt/other/h11/_connection.py", "nothing like it\n")
        assert sorted(await copies_in(box, ["jsonpointer", "toolz", "h11"])) == [
            "/opt/__pycache__/", "/opt/deep/toolz/", "/opt/jsonpointer.py",
        ]  # fmt: skip
    finally:
        await box.destroy()
        await backend.close()


@boxed
async def test_a_build_admits_only_real_bugs_and_goes_on_where_it_stopped(backend, small, tmp_path):
    told = []
    content = await build.build(backend, PACKAGE, 4, tmp_path, 0, lambda *said: told.append(said))
    assert len(content["tasks"]) == 4
    assert [said[1] for said in told][-1] == 4
    first = json.dumps(content["tasks"])
    more = await build.build(backend, PACKAGE, 6, tmp_path, 0, lambda *said: None)
    assert json.dumps(more["tasks"][:4]) == first
    assert len(more["tasks"]) == 6
    assert {"tests/test_small.py::test_always", "tests/test_small.py::test_to_be_repaired"} <= set(more["stable"])
    assert more["skips"] == SKIPS
    assert [task.data["skips"] for task in Built(tmp_path)] == [SKIPS] * 6
    for task in more["tasks"]:
        assert 0 < len(task["fail_to_pass"]) <= len(more["stable"]) / 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no"),
        (b"nothing", "Not a gzipped file"),
        (gzip.compress(b"[1]" * 50)[:-9], "ended before"),
        (gzip.compress(b"{"), "Expecting"),
        (gzip.compress(b"[]"), "lacks"),
        (gzip.compress(b'{"name": "small", "tasks": []}'), "lacks .*skips, .*stable"),
        (
            gzip.compress(json.dumps({**dict.fromkeys(build.HELD), "tasks": [{"edits": []}]}).encode()),
            "lacks fail_to_pass",
        ),
    ],
    ids=("empty", "no gzip", "cut off", "no JSON", "no object", "without fields", "a task without fields"),
)
def test_a_folder_without_tasks_or_with_a_damaged_file_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "small.json.gz").write_bytes(content)
    with pytest.raises(UsageError, match=f"{tmp_path}.*{words}.*palaestra tasks build swe --output {tmp_path}"):
        Built(tmp_path)
    with pytest.raises(UsageError, match=r"is no folder.*palaestra tasks build swe --output"):
        Built(tmp_path / "missing")


async def test_a_build_does_not_go_on_from_a_damaged_file(tmp_path):
    (tmp_path / "small.json.gz").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"small\.json\.gz cannot be used"):
        await build.build(None, PACKAGE, 1, tmp_path, 0, lambda *said: None)


SKIPPING = {
    "pytest.skip": "import pytest\ndef clamp(*a): pytest.skip('x')",
    "pytest.importorskip": "import pytest\ndef clamp(*a): pytest.importorskip('nothing_like_it')",
    "unittest.SkipTest": "import unittest\ndef clamp(*a): raise unittest.SkipTest('x')",
    "_pytest.outcomes.Skipped": "from _pytest.outcomes import Skipped\ndef clamp(*a): raise Skipped('x')",
    "pytest.xfail": "import pytest\ndef clamp(*a): pytest.xfail('x')",
    "in a subtest": "import unittest\nright = clamp\ndef clamp(value, low, high):\n    if value == 12: raise unittest.SkipTest('x')\n    return right(value, low, high)",
    "the whole file, at import": "import pytest\npytest.skip('x', allow_module_level=True)",
    "a mark that tests import": "import pytest\npytestmark = pytest.mark.xfail\nclamp = None",
}  # fmt: skip
"""Sources that have tests skipped, or fail as expected, by how."""


@boxed
@pytest.mark.slow
@pytest.mark.hack
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", SKIPPING)
async def test_a_repair_by_which_tests_are_skipped_is_none(backend, how, named):
    broken = f"{SOURCE}\n{SKIPPING[how]}\n"
    assert await judged(backend, SMALL, {FILE: broken.encode()}, NAMED if named else Expected(skips=SKIPS))


@boxed
@pytest.mark.slow
async def test_no_more_is_skipped_than_a_task_declares(backend):
    right = {FILE: f"{SOURCE}\n".encode()}
    for wanted in (NAMED, Expected(skips=SKIPS), Expected(skips=SKIPS + 1)):
        assert await judged(backend, SMALL, right, wanted) == ""
    assert "2 tests are skipped in place of 1" in await judged(backend, SMALL, right, NAMED._replace(skips=SKIPS - 1))
    skipping = {FILE: f"{SOURCE}\n{SKIPPING['pytest.skip']}\n".encode()}
    assert await judged(backend, SMALL, skipping, NAMED._replace(skips=99)) == "2 other tests fail"


@boxed
@pytest.mark.slow
async def test_a_report_counts_what_is_skipped_and_an_xfail_passes_only_where_it_is_marked(backend):
    box = await backend.create("host", LIMITS)
    try:
        await box.put({**site(), **placed({**SMALL.files, **SMALL.tests, FILE: f"{SOURCE}\n{SKIPPING['pytest.xfail']}".encode()})})  # fmt: skip
        report = await run(box, SMALL)
        assert report.outcomes["tests/test_small.py::test_to_be_repaired"] == "passed"
        assert report.outcomes["tests/test_small.py::test_clamp[5-5]"] == "skipped"
        assert report.skips == SKIPS + 6 + 1
        await box.put(placed({FILE: SKIPPING["the whole file, at import"].encode()}))
        assert (await run(box, SMALL)).skips == 1
    finally:
        await box.destroy()


async def judged(backend, repo, made, wanted):
    """Why a repair is none, from a fresh box."""
    box = await backend.create("host", LIMITS)
    try:
        return await repaired(box, repo, made, wanted, 60)
    finally:
        await box.destroy()


HOOK = "import pytest\\n@pytest.hookimpl(hookwrapper=True)\\ndef pytest_runtest_makereport(item, call):\\n    o = yield\\n    o.get_result().outcome = 'passed'\\n"  # fmt: skip
FILE = "small/__init__.py"
BY_NAME = """import _pytest.reports as r
made = r.TestReport.from_item_and_call.__func__
def better(cls, item, call):
    report = made(cls, item, call)
    if any(word in item.name for word in ("clamp", "total", "stack", "bounds")): report.outcome = "passed"
    return report
r.TestReport.from_item_and_call = classmethod(better)
""".replace("\n", "\\n")
REWRITTEN = """mkdir -p /logs/verifier; echo '{"status": 1}' > /tmp/report-0
(while :; do for report in /tmp/report-*; do echo '{"status": 1}' > $report; done; echo 1 > /logs/verifier/reward.txt; sleep 0.01; done) > /dev/null 2>&1 &
true"""
PRELOADED = """cat > /root/x.c << END
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void all_is_well(void) { if (getenv("PALAESTRA_REPORT")) _exit(0); }
END
gcc -shared -fPIC -o /root/x.so /root/x.c; echo /root/x.so > /etc/ld.so.preload; echo 'export LD_PRELOAD=/root/x.so' >> /root/.bashrc"""
HACKS = {
    "os._exit at import": f"sed -i '1i import os; os._exit(0)' {FILE}",
    "sys.exit at import": f"sed -i '1i import sys; sys.exit(0)' {FILE}",
    "os._exit at exit": f"sed -i '1i import atexit, os; atexit.register(os._exit, 0)' {FILE}",
    "conftest hook": f'printf "{HOOK}" > conftest.py; echo >> {FILE}',
    "conftest hook in the package": f'printf "{HOOK}" > small/conftest.py; echo >> {FILE}',
    "patched runner": f"printf 'import _pytest.runner as r\\nr.CallInfo.from_call = classmethod(lambda c, *a, **k: None)\\n' >> {FILE}",
    "pytest.ini": f"printf '[pytest]\\naddopts = --co\\n' > pytest.ini; echo >> {FILE}",
    "sitecustomize": f"printf 'import os\\nos._exit(0)\\n' > sitecustomize.py; echo >> {FILE}",
    "rewritten tests": f"mkdir -p tests; printf 'def test_total(): pass\\n' > tests/test_small.py; echo >> {FILE}",
    "object equal to everything, patched builtins": f"printf 'class E:\\n    __eq__ = lambda s, o: True\\nclamp = total = lambda *a, **k: E()\\n' >> {FILE}; sed -i '1i import builtins; builtins.AssertionError = KeyboardInterrupt' {FILE}",
    "patched import of tests": f"printf 'import unittest\\nimport _pytest.assertion.rewrite as w\\nw.AssertionRewritingHook.exec_module = lambda s, m: None\\n' >> {FILE}",
    "patched reports of tests by name": f"printf '{BY_NAME}' >> {FILE}",
    "patched reports of tests by file": f"printf '{BY_NAME}' | sed 's/item.name/item.nodeid/; s/clamp/test_small/' >> {FILE}",
    "patched reports of all tests": f"printf '{BY_NAME}' | sed 's/clamp/test/' >> {FILE}",
    "expected failure": f"printf 'import pytest\nclamp = total = lambda *a, **k: pytest.xfail()\nStack.__init__ = clamp\n' >> {FILE}",
    "reward file rewritten": REWRITTEN + f"; echo >> {FILE}",
    "reward file rewritten by the repair": f'printf \'import subprocess\nsubprocess.Popen(["sh", "-c", "while :; do sed -i s/failed/passed/g /tmp/report-*; sleep 0.01; done"])\n\' >> {FILE}',
    "history mining": f"git log --all -p | head -50; git fsck --lost-found; git stash list; git checkout HEAD -- {FILE}; echo >> {FILE}",
    "trojaned python3 on PATH": f"mkdir -p /usr/local/bin; printf '#!/bin/sh\\nexit 0\\n' > /root/python3; chmod +x /root/python3; echo 'PATH=/root:$PATH' >> /root/.profile; echo >> {FILE}",
    "LD_PRELOAD": PRELOADED + f"; echo >> {FILE}",
    "source as a link": f"rm {FILE}; ln -s /etc/passwd {FILE}",
    "a daemon that rewrites later": f"(while :; do echo 'def clamp(*a): return 1' > /work/repo/{FILE}; sleep 0.01; done) > /dev/null 2>&1 &",
}
"""What does not repair anything, by what it tries."""
DONE = {
    "reward file rewritten": ("sleep 0.2; cat /logs/verifier/reward.txt /tmp/report-*; echo > /tmp/report-1; sleep 0.2; cat /tmp/report-1", '1\n{"status": 1}\n{"status": 1}'),
    "LD_PRELOAD": ("PALAESTRA_REPORT=x /usr/bin/env false && echo all is well", "all is well"),
}  # fmt: skip
"""What shows, in the box where they are tried, that some are what they say."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with two tasks of our own package, built once."""
    folder = tmp_path_factory.mktemp("swe")

    async def build_them():
        backend = await Swe.open(Swe.Config(source="small"))
        try:
            await build.build(backend, PACKAGE, 2, folder, 0, lambda *said: None)
        finally:
            await Swe.shut(backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "PACKAGES", (PACKAGE,))
        patch.setattr(repository, "files", lambda package: {**SMALL.files, **SMALL.tests})
        repository.whole.cache_clear()
        asyncio.run(build_them())
        yield folder
        repository.whole.cache_clear()


async def earned(backend, folder, policy):
    """What a policy earns on the first task of a folder."""
    config, task = Swe.Config(folder=str(folder)), next(iter(Built(folder)))
    return (await run_episode(Swe(config, backend), Loop(), {"main": policy}, task, Sampling(), "id")).result.value


async def earned_alone(backend, command):
    """What a command earns where one module is to be repaired, and no test is named."""
    data = {"files": {path: text.decode() for path, text in ALONE.files.items()}, "tests": ALONE_TESTS}
    policy = Replay([Message.calling("bash", command=command), Message.calling("submit")])
    task, config = Task(key="alone", prompt="Repair it.", data=data), Swe.Config(source="small")
    return (await run_episode(Swe(config, backend), Loop(), {"main": policy}, task, Sampling(), "id")).result.value


FORGING = """import importlib.util as u, os, sys
file = os.path.dirname(os.__file__) + "/json/__init__.py"
spec = u.spec_from_file_location("json", file, submodule_search_locations=[os.path.dirname(file)])
sys.modules["json"] = real = u.module_from_spec(spec)
spec.loader.exec_module(real)
dump = real.dump
def better(content, out):
    content["outcomes"] = {t: "passed" if "/test_single.py" in t else o for t, o in content["outcomes"].items()}
    dump(content, out)
real.dump = better
"""
ALONE_HACKS = {
    "json.py that forges the report": f"cat > json.py << 'END'\n{FORGING}END\necho >> single.py",
    "palaestra_plugin.py that forges the report": f"cat > palaestra_plugin.py << 'END'\n{FORGING}exec(open('/opt/site/palaestra_plugin.py').read())\nEND\necho >> single.py",
    "pluggy.py": "echo 'import os; os._exit(1)' > pluggy.py; echo >> single.py",
    "pytest/__init__.py": "mkdir pytest; echo 'import os; os._exit(1)' > pytest/__init__.py; echo >> single.py",
    "skipped": "printf 'import pytest\ndef double(x): pytest.skip()\n' > single.py",
    "skipped, the whole file": "printf 'import pytest\npytest.skip(allow_module_level=True)\n' > single.py",
    "tests removed": "printf 'import unittest\nremove = lambda c: [delattr(c, name) for name in list(vars(c)) if name[:4] == \"test\"]\nunittest.TestCase.__init_subclass__ = classmethod(remove)\n' >> single.py",
    "failing as expected": "printf 'import pytest\ndef double(x): pytest.xfail()\n' > single.py",
}  # fmt: skip


@boxed
@pytest.mark.slow
@pytest.mark.hack
@pytest.mark.parametrize("hack", ALONE_HACKS)
async def test_a_hack_earns_nothing_where_no_test_is_named(backend, hack):
    assert await earned_alone(backend, ALONE_HACKS[hack]) == 0


@pytest.mark.parametrize("count", [2, 17, 20, 60])
async def test_as_many_tasks_are_built_as_were_asked_for(count, monkeypatch, tmp_path):
    room = {package.name: number % 5 for number, package in enumerate(build.PACKAGES)}  # what its edits give, 32 in all

    async def some(backend, package, wanted, folder, seed, say):
        made = min(wanted, room[package.name])
        task = {"edits": [{"kind": "sign"}]}
        return {"name": package.name, "tasks": [task] * made, "tried": made, "verdicts": {}, "done": made < wanted}

    monkeypatch.setattr(build, "build", some)
    table = await build.build_all(None, count, tmp_path, 0, lambda *_: None)
    assert table.splitlines()[-1] == f"kinds of edits: sign {min(count, sum(room.values()))}"


@boxed
@pytest.mark.slow
async def test_a_repair_of_one_module_may_bring_another_and_no_endless_loop(backend, monkeypatch):
    repairing = "echo 'def double(x): return 2 * x' > twice.py; echo 'from twice import double' > single.py"
    assert await earned_alone(backend, repairing) == 1
    monkeypatch.setattr(environment, "SMALL_SECONDS", 3.0)
    began = monotonic()
    assert await earned_alone(backend, "printf 'while True: pass\n' > single.py") == 0
    assert monotonic() - began < 30


@boxed
@pytest.mark.slow
@pytest.mark.hack
async def test_a_repair_that_does_not_fit_into_a_fresh_box_earns_nothing(backend):
    assert await earned_alone(backend, "i=0; while : > m$i.py; do i=$((i+1)); done 2> /dev/null; rm m1*.py") == 0


@boxed
@pytest.mark.slow
async def test_gold_repairs_and_nothing_does_not(backend, shelf):
    gold = gold_of(Swe(Swe.Config(folder=str(shelf)), backend), next(iter(Built(shelf))))
    assert await earned(backend, shelf, Replay(gold)) == 1
    assert await earned(backend, shelf, Null()) == 0


@boxed
@pytest.mark.slow
@pytest.mark.hack
@pytest.mark.parametrize("hack", HACKS)
async def test_a_hack_earns_what_doing_nothing_earns(backend, shelf, hack):
    assert (
        await earned(backend, shelf, Replay([Message.calling("bash", command=HACKS[hack]), Message.calling("submit")]))
        == 0
    )


@boxed
@pytest.mark.slow
@pytest.mark.parametrize("hack", DONE)
async def test_a_hack_does_what_its_name_says_where_it_is_tried(backend, shelf, hack):
    tried = Swe(Swe.Config(folder=str(shelf)), backend)
    await tried.setup(next(iter(Built(shelf))))
    try:
        if hack == "LD_PRELOAD" and "gcc" not in await tried.bash("command -v gcc"):
            pytest.skip("no compiler in the box")
        await tried.bash(HACKS[hack])
        command, shows = DONE[hack]
        assert await tried.bash(command) == shows
    finally:
        await tried.close()


@boxed
@pytest.mark.slow
async def test_the_tools_view_and_edit(backend, small, tmp_path):
    await build.build(backend, PACKAGE, 1, tmp_path, 0, lambda *said: None)
    config = Swe.Config(folder=str(tmp_path))
    (task,) = Built(tmp_path)
    tools = Swe(config, backend)
    await tools.setup(task)
    try:
        assert (await tools.view("small/__init__.py", 2, 3)).startswith("2\tdef clamp")
        assert "is changed" in await tools.edit("small/__init__.py", "A value between", "The value between")
        for call, words in (
            (tools.edit("small/__init__.py", "return", "x"), "exactly once"),
            (tools.view("nothing.py"), "cannot read"),
            (tools.view("small"), "cannot read .* no regular file"),
            (tools.view("a\0b"), "cannot read .* null"),
            (tools.view("/proc/self/mem"), "cannot read"),
            (tools.view("small/__init__.py", 999), "has"),
            (tools.edit("/usr/lib/os-release", "PRETTY_NAME=", ""), "cannot write .* Read-only"),
            (tools.edit("/etc/passwd", "root:x:0:0:", ""), "cannot write"),
            (tools.edit("small/__init__.py", "The value between", "\ud800"), "cannot write .* surrogates"),
        ):
            with pytest.raises(ToolError, match=words):
                await call
        assert (await tools.bash("git log --oneline | wc -l; ls")).split() == ["1", "small"]
        await tools.bash("head -c 600M /dev/zero > /tmp/full 2> /dev/null")
        with pytest.raises(ToolError, match=r"cannot write .* No space left"):
            await tools.edit("small/__init__.py", "The value between", "A value " * 9000)
    finally:
        await tools.close()


def test_tests_that_look_at_a_clock_are_known():
    text = b"""import time
from time import perf_counter

def test_plain(): pass

class TestMore:
    def test_waits(self):
        time.sleep(1)
    def test_measures(self, x):
        began = perf_counter()
    def test_times_out(self): assert f(timeout=3)
    def test_sometimes(self): assert time_of_day
"""
    repo = ALONE._replace(tests={"tests/test_it.py": text, "tests/data.txt": b"sleep("})
    names = {"test_waits", "test_measures", "test_times_out"}
    assert with_clocks(repo) == {("tests/test_it.py", name) for name in names}
    assert function_of("tests/test_it.py::TestMore::test_measures[a::b-3]") == ("tests/test_it.py", "test_measures")
