"""Whether a repair is one: the changed source files alone, in a fresh box, with pristine tests and sentinels.

What runs there shares a process with the code under test, so a report alone proves nothing. The sentinels are tests
with names and bodies drawn for this verdict, among the real ones: some must fail, some must pass, and a run in which
any of them comes to something else, or in which the set of tests is not the expected one, earns nothing.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from palaestra.environments.swe.repository import Repository
from palaestra.environments.swe.tests_run import REPO, Report, placed, run, site
from palaestra.gym.sandbox import Box, Entry

LARGEST = 400_000
"""Bytes of a source file that is taken."""
WORDS = ("value", "order", "empty", "nested", "unicode", "large", "default", "copy", "merge", "split", "round", "index")


class Sentinels(NamedTuple):
    """A test module of ours, and which of its tests must pass and which fail."""

    path: str
    text: str
    passing: tuple[str, ...]
    failing: tuple[str, ...]


class Repair(NamedTuple):
    """What an agent changed: the files that are taken (None: deleted), and the paths that are not."""

    taken: dict[str, bytes | None]
    refused: list[str]


def repair(repo: Repository, changes: Mapping[str, Entry | None]) -> Repair:
    """The changed source files of a box's difference; tests, settings, links and whatever else is left behind."""
    taken: dict[str, bytes | None] = {}
    refused = []
    for path, entry in changes.items():
        name = path.removeprefix(f"{REPO}/")
        if not path.startswith(f"{REPO}/") or name.startswith(".git/") or name == ".git" or "__pycache__" in name:
            continue
        if entry is not None and entry.kind == "directory":
            continue
        if entry is not None and name in repo.files and entry.content == repo.files[name] and entry.kind == "file":
            continue
        if not _allowed(repo, name) or (entry is not None and (entry.kind != "file" or len(entry.content) > LARGEST)):
            refused.append(name)
            continue
        taken[name] = None if entry is None else entry.content
    return Repair(taken, refused)


def _allowed(repo: Repository, name: str) -> bool:
    """Sources that there were, and new modules beside them, unless Python or pytest would run them by themselves."""
    special = ("conftest.py", "sitecustomize.py", "usercustomize.py", "setup.py")
    folders = {path.rpartition("/")[0] for path in repo.sources}
    plain = name.endswith(".py") and name.rpartition("/")[2] not in special and name not in repo.tests
    return name in repo.sources or (plain and name.rpartition("/")[0] in folders and name not in repo.files)


def sentinels(repo: Repository) -> Sentinels:
    """Tests that look like any others."""
    r = random.Random(secrets.token_bytes(16))
    folder = repo.arguments[0] if not repo.arguments[0].endswith(".py") else repo.arguments[0].rpartition("/")[0]
    path = f"{folder}/test_{'_'.join(r.sample(WORDS, 3))}.py".lstrip("/")
    names = [f"test_{'_'.join(r.sample(WORDS, 2))}_{r.randrange(100)}" for _ in range(6)]
    names = list(dict.fromkeys(names))
    failing = set(r.sample(names, len(names) // 2))
    bodies = []
    for name in names:
        a, b = r.randrange(1000), r.randrange(1000)
        total = a + b + (r.randrange(1, 9) if name in failing else 0)
        bodies.append(f"def {name}():\n    left, right = {a}, {b}\n    assert left + right == {total}\n")
    ids = {name: f"{path}::{name}" for name in names}
    passing = tuple(ids[name] for name in names if name not in failing)
    return Sentinels(path, "\n\n".join(bodies), passing, tuple(ids[name] for name in names if name in failing))


async def repaired(
    box: Box, repo: Repository, made: Repair, wanted: Sequence[str], stable: Sequence[str], seconds: float
) -> str:
    """Run everything in a fresh box; empty where the repair holds, else why it does not."""
    watch = sentinels(repo)
    files = {path: content for path, content in {**repo.files, **made.taken}.items() if content is not None}
    tests = {**repo.tests, watch.path: watch.text.encode()}
    await box.put({**placed({**files, **tests}), **site()})
    places = sorted({*repo.arguments, watch.path})
    report = await run(box, repo, places, seconds)
    return _verdict(report, watch, wanted, stable)


def _verdict(report: Report, watch: Sentinels, wanted: Sequence[str], stable: Sequence[str]) -> str:
    if report.status != 1:  # the sentinels that must fail make it 1
        return f"the tests did not come to their end (status {report.status})"
    if not report.all(watch.passing) or not report.all(watch.failing, ("failed",)):
        return "the tests were tampered with"
    if not wanted:
        return _all_hold(report, watch)
    if not report.all(wanted):
        return "the bug is still there"
    broken = [test for test in stable if report.outcomes.get(test) not in ("passed", "skipped")]
    return f"{len(broken)} other tests fail" if broken else ""


def _all_hold(report: Report, watch: Sentinels) -> str:
    """Where no tests are named, all of them must hold, and there must be some."""
    ours = {*watch.passing, *watch.failing}
    real = {test: outcome for test, outcome in report.outcomes.items() if test not in ours}
    failing = [test for test, outcome in real.items() if outcome == "failed"]
    if "passed" not in real.values():
        return "no test passes"
    return f"{len(failing)} tests fail" if failing else ""
