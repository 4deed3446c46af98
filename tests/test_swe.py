"""Repair tasks: edits that change what a program means, a build that admits only real bugs, a verifier that is not fooled."""

from __future__ import annotations

import ast
import asyncio
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.environments.sandbox.backends import lacks_native, open_backend
from palaestra.environments.swe import build, packages, repository
from palaestra.environments.swe.copies import copies_in
from palaestra.environments.swe.environment import LIMITS, Built, Swe
from palaestra.environments.swe.issues import issue
from palaestra.environments.swe.mutations import OPERATORS, Edit, applied, edits
from palaestra.environments.swe.verify import repair, sentinels
from palaestra.gym.agent import Loop
from palaestra.gym.environment import gold_of
from palaestra.gym.episode import run_episode
from palaestra.gym.policies import Null
from palaestra.gym.policy import Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Entry
from palaestra.gym.types import Message, Sampling

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
import pytest
from small import Stack, clamp, total


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
"""
SMALL = repository.Repository({"small/__init__.py": SOURCE.encode()}, {"tests/test_small.py": TESTS.encode()}, ".", ("tests",), ("small/__init__.py",))  # fmt: skip
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
    made = repair(SMALL, {f"/work/repo/{name}": entry for name, entry in names.items()} | {"/etc/x": file})
    assert set(made.taken) == {"small/__init__.py", "small/new.py"}
    assert set(made.refused) == {"small/conftest.py", "tests/test_small.py", "pytest.ini", "sitecustomize.py", "small/link.py", "small/huge.py"}  # fmt: skip


def test_sentinels_differ_each_time_and_do_what_they_say():
    one, two = sentinels(SMALL), sentinels(SMALL)
    assert one.text != two.text
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
@boxed
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
    assert "tests/test_small.py::test_always" in more["stable"]
    for task in more["tasks"]:
        assert 0 < len(task["fail_to_pass"]) <= len(more["stable"]) / 2


HOOK = "import pytest\\n@pytest.hookimpl(hookwrapper=True)\\ndef pytest_runtest_makereport(item, call):\\n    o = yield\\n    o.get_result().outcome = 'passed'\\n"  # fmt: skip
FILE = "small/__init__.py"
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
    "reward file, history mining": "echo 1 > /logs; git log --all | head; git fsck --lost-found; echo reward 1",
    "trojaned python3 on PATH": f"mkdir -p /usr/local/bin; printf '#!/bin/sh\\nexit 0\\n' > /root/python3; chmod +x /root/python3; echo 'PATH=/root:$PATH' >> /root/.profile; echo >> {FILE}",
    "LD_PRELOAD": f"echo /root/x.so > /etc/ld.so.preload; echo >> {FILE}",
    "source as a link": f"rm {FILE}; ln -s /etc/passwd {FILE}",
    "a daemon that rewrites later": f"(while :; do echo 'def clamp(*a): return 1' > /work/repo/{FILE}; sleep 0.01; done) > /dev/null 2>&1 &",
}
"""What does not repair anything, by what it tries."""


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
async def test_the_tools_view_and_edit(backend, small, tmp_path):
    await build.build(backend, PACKAGE, 1, tmp_path, 0, lambda *said: None)
    config = Swe.Config(folder=str(tmp_path))
    (task,) = Built(tmp_path)
    environment = Swe(config, backend)
    await environment.setup(task)
    try:
        assert (await environment.view("small/__init__.py", 2, 3)).startswith("2\tdef clamp")
        assert "is changed" in await environment.edit("small/__init__.py", "A value between", "The value between")
        for call, words in (
            (environment.edit("small/__init__.py", "return", "x"), "exactly once"),
            (environment.view("nothing.py"), "cannot read"),
            (environment.view("small/__init__.py", 999), "has"),
        ):
            with pytest.raises(Exception, match=words):
                await call
        assert (await environment.bash("git log --oneline | wc -l; ls")).split() == ["1", "small"]
    finally:
        await environment.close()
