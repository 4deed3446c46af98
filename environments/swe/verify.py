"""Whether a repair is one: the changed source files alone, in a fresh box, with pristine tests and sentinels.

What runs there shares a process with the code under test, so a report alone proves nothing. The sentinels are tests
with bodies drawn for this verdict and the names of real ones, or like them: some must fail, some must pass, and a run
in which any of them comes to something else, in which tests lack, or more are skipped than the task declares, earns
nothing.
"""

from __future__ import annotations

import random
import re
import secrets
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, NamedTuple

from palaestra.environments.swe.repository import Repository
from palaestra.environments.swe.tests_run import REPO, Report, placed, run, runs, site
from palaestra.gym.sandbox import Box, Entry

LARGEST = 400_000
"""Bytes of a source file that is taken."""
SPECIAL = {"conftest", "sitecustomize", "usercustomize", "setup"}
"""Modules that Python or pytest would run by themselves."""
TEST = re.compile(r"^ *(?:async )?def (test\w*)\(", re.MULTILINE)
MODELS = 3
"""How many tests the sentinels are named after."""
WORDS = ("value", "order", "empty", "nested", "unicode", "large", "default", "copy", "merge", "split", "round", "index")


class Sentinels(NamedTuple):
    """A test module of ours, and which of its tests must pass and which fail."""

    path: str
    text: str
    passing: tuple[str, ...]
    failing: tuple[str, ...]


class Expected(NamedTuple):
    """What a task declares: the tests that failed and must pass (none: all must), those that passed and still must, and
    how many tests and subtests are skipped."""

    wanted: Sequence[str] = ()
    stable: Sequence[str] = ()
    skips: int = 0


def expected(data: Mapping[str, Any]) -> Expected:
    """What a task's `data` declares."""
    return Expected(data.get("fail_to_pass", ()), data.get("stable", ()), data.get("skips", 0))


def repair(repo: Repository, changes: Mapping[str, Entry | None]) -> dict[str, bytes | None]:
    """The changed source files of a box's difference (None: deleted); tests, settings, links and whatever else is left
    behind."""
    taken: dict[str, bytes | None] = {}
    for path, entry in changes.items():
        name = path.removeprefix(f"{REPO}/")
        if name == path or not _allowed(repo, name):
            continue
        if entry is None:
            taken[name] = None
        elif entry.kind == "file" and len(entry.content) <= LARGEST and entry.content != repo.files.get(name):
            taken[name] = entry.content
    return taken


def _allowed(repo: Repository, name: str) -> bool:
    """Sources that there were, and new modules beside them that stand in nothing's place."""
    if name in repo.sources or name in repo.files or name in repo.tests:
        return name in repo.sources
    path = PurePath(name)
    beside = any(path.parent == PurePath(source).parent for source in repo.sources)
    return beside and path.suffix == ".py" and path.stem not in SPECIAL | sys.stdlib_module_names | runs()


def sentinels(repo: Repository, wanted: Sequence[str] = ()) -> Sentinels:
    """Tests that look like those that must pass (none: like any others). One that has the name of a real one fails."""
    r = random.Random(secrets.token_bytes(16))
    models = _models(repo, wanted) or [("test_more", "test_more")]
    models = r.sample(models, min(MODELS, len(models)))
    folder = repo.arguments[0] if not repo.arguments[0].endswith(".py") else repo.arguments[0].rpartition("/")[0]
    path = f"{folder}/{models[0][0]}_{'_'.join(r.sample(WORDS, 3))}.py".lstrip("/")
    real = {name for _, name in models}
    alike = {f"{r.choice(models)[1]}_{'_'.join(r.sample(WORDS, 2))}_{r.randrange(100)}" for _ in range(MODELS)} - real
    names = r.sample(sorted(real | alike), len(real | alike))
    failing = real | set(r.sample(sorted(alike), len(alike) // 2))
    bodies = []
    for name in names:
        a, b = r.randrange(1000), r.randrange(1000)
        total = a + b + (r.randrange(1, 9) if name in failing else 0)
        bodies.append(f"def {name}():\n    left, right = {a}, {b}\n    assert left + right == {total}\n")
    ids = {name: f"{path}::{name}" for name in names}
    passing = tuple(ids[name] for name in names if name not in failing)
    return Sentinels(path, "\n\n".join(bodies), passing, tuple(ids[name] for name in names if name in failing))


def _models(repo: Repository, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """The module and name of tests: of those that must pass, or of all."""
    named = [test.partition("[")[0] for test in wanted]
    found = {(test.partition("::")[0], test.rpartition("::")[2]) for test in named if "::" in test} or {
        (path, name)
        for path, text in repo.tests.items()
        if path.endswith(".py")
        for name in TEST.findall(text.decode(errors="replace"))
    }
    return sorted((PurePath(path).stem, name) for path, name in found)


async def repaired(
    box: Box, repo: Repository, made: Mapping[str, bytes | None], wanted: Expected, seconds: float
) -> str:
    """Run everything in a fresh box; empty where the repair holds, else why it does not."""
    watch = sentinels(repo, wanted.wanted)
    files = {path: content for path, content in {**repo.files, **made}.items() if content is not None}
    tests = {**repo.tests, watch.path: watch.text.encode()}
    try:
        await box.put({**placed({**files, **tests}), **site()})
    except OSError as error:
        return f"the repair does not fit into a fresh box: {error}"
    places = sorted({*repo.arguments, watch.path})
    report = await run(box, repo, places, seconds)
    return _verdict(report, watch, wanted, {name for _, name in _models(repo, ())})


def _verdict(report: Report, watch: Sentinels, wanted: Expected, names: Set[str]) -> str:
    if report.status != 1:  # the sentinels that must fail make it 1
        return f"the tests did not come to their end (status {report.status})"
    if not report.all(watch.passing) or not report.all(watch.failing, ("failed",)):
        return "the tests were tampered with"
    if report.skips > wanted.skips:
        return f"{report.skips} tests are skipped in place of {wanted.skips}"
    if not wanted.wanted:
        return _all_hold(report, watch, names)
    if not report.all(wanted.wanted):
        return "the bug is still there"
    broken = [test for test in wanted.stable if report.outcomes.get(test) != "passed"]
    return f"{len(broken)} other tests fail" if broken else ""


def _all_hold(report: Report, watch: Sentinels, names: Set[str]) -> str:
    """Where a task declares no tests, all must hold, there must be some, and those of all names must have run."""
    ours = {*watch.passing, *watch.failing}
    real = {test: outcome for test, outcome in report.outcomes.items() if test not in ours}
    failing = [test for test, outcome in real.items() if outcome == "failed"]
    lacking = names - {test.partition("[")[0].rpartition("::")[2] for test in real}
    if lacking:
        return f"{len(lacking)} tests did not run"
    if "passed" not in real.values():
        return "no test passes"
    return f"{len(failing)} tests fail" if failing else ""
