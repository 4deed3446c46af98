"""Makes repair tasks: bugs by syntax-tree edits, each admitted only where some tests fail with it every time, the same
tests pass without it, and others pass both times.

A package's tasks are kept in one file, written anew after every candidate: a build that was stopped goes on.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox.backends import Backend
from palaestra.environments.sandbox.images import HOST
from palaestra.environments.swe.issues import issue
from palaestra.environments.swe.mutations import Edit, applied, edits
from palaestra.environments.swe.packages import PACKAGES, Package
from palaestra.environments.swe.repository import Repository, whole
from palaestra.environments.swe.tests_run import Report, placed, run, site
from palaestra.gym.environment import Progress
from palaestra.gym.files import write_whole
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, BoxLimits

AT_ONCE = 2
LIMITS = BoxLimits(memory=1 << 30, disk=512 << 20, processes=256)
HURRY = 0.15
"""The share of a core on which no test may fail: one that does depends on time, and would fail on a busy machine."""
COMBINED = 0.25
"""The share of candidates with two edits."""
MOST_FAILING = 0.5
"""A larger share of failing tests means that the package is broken altogether."""
TESTS = 200
"""Test ids of one command line; where more cover an edit, their files are run."""
SLOW = 4.0
"""How many times the clean run's time a run with a bug may take."""
CLOCK = re.compile(r"\b(perf_counter|monotonic|process_time|sleep|timeit|alarm|timeout\w*|time\.time)\b")
"""What a test's source holds that looks at a clock or waits: it would judge the machine."""
HELD = {*Package._fields, "stable", "skips", "tasks", "tried", "verdicts", "done"}
OF_TASK = {"edits", "fail_to_pass", "level", "issue", "seed"}
"""What a package's file holds, and each of its tasks."""


async def build_all(backend: Backend, count: int, folder: Path, seed: int, say: Progress) -> str:
    """Make `count` tasks, as nearly as may be the same number of each package as far as its edits go, two packages at a
    time.

    Returns a table of what was tried and found by package, and by kind of edit.
    """
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(package: Package) -> dict[str, Any]:
        async with gate:
            return await build(backend, package, wanted[package.name], folder, seed, say)

    wanted, found = Counter[str](), dict[str, dict[str, Any]]()
    going_on, missing = list(PACKAGES), count
    while missing > 0 and going_on:
        for number, package in enumerate(going_on):
            wanted[package.name] += missing // len(going_on) + (number < missing % len(going_on))
        chosen = [package for package in PACKAGES if wanted[package.name]]
        contents = await asyncio.gather(*(one(package) for package in chosen))
        found = {package.name: content for package, content in zip(chosen, contents, strict=True)}
        going_on = [package for package in PACKAGES if not found.get(package.name, {"done": False})["done"]]
        missing = count - sum(len(content["tasks"]) for content in contents)
    return _table(list(found.values()))


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["package             tasks  tried  refused because"]
    kinds: Counter[str] = Counter()
    for content in found:
        kinds.update(edit["kind"] for task in content["tasks"] for edit in task["edits"])
        refused = {why: n for why, n in sorted(content["verdicts"].items()) if why != "admitted"}
        why = ", ".join(f"{why}: {n}" for why, n in refused.items())
        lines.append(f"{content['name']:<18} {len(content['tasks']):>6} {content['tried']:>6}  {why}")
    lines.append("kinds of edits: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
    return "\n".join(lines)


async def build(
    backend: Backend, package: Package, wanted: int, folder: Path, seed: int, say: Progress
) -> dict[str, Any]:
    """Make `wanted` tasks of a package, or as many as its edits give. Returns what the package's file holds."""
    path = folder / f"{package.name}.json.gz"
    kept = read(path) if path.exists() else None
    if kept is not None and (kept["done"] or len(kept["tasks"]) >= wanted):
        return kept
    repo = whole(package.name)
    workshop = await Workshop.of(backend, repo, kept["stable"] if kept else ())
    try:
        content = kept or {
            **package._asdict(),
            "stable": workshop.stable,
            "skips": workshop.skips,
            "tasks": [],
            "tried": 0,
            "verdicts": {},
            "done": False,
        }
        candidates = _candidates(repo, workshop, random.Random(f"{package.name}/{seed}"))
        verdicts = Counter(content["verdicts"])
        for chosen in candidates[content["tried"] :]:
            if len(content["tasks"]) >= wanted:
                break
            verdict, report = await workshop.judge(chosen)
            verdicts[verdict] += 1
            content["tried"] += 1
            if report is not None:
                content["tasks"].append(_task(package, chosen, report, workshop, seed))
            content["verdicts"] = dict(verdicts)
            _write(path, content)
            say(package.name, len(content["tasks"]), wanted)
        content["done"] = len(content["tasks"]) < wanted
        _write(path, content)
        return content
    finally:
        await workshop.box.destroy()


class Workshop:
    """A box with a package and its tests, what the tests come to without a bug (`clean`, in so many seconds), and which
    functions each calls (`covered`)."""

    def __init__(
        self, box: Box, repo: Repository, stable: Iterable[str], clean: Report, covered: Report, seconds: float
    ) -> None:
        self.box = box
        self.repo = repo
        self.seconds = seconds
        self.skips = max(clean.skips, covered.skips)
        clocked = with_clocks(repo)
        self.stable = sorted(
            test for test in stable if covered.outcomes.get(test) == "passed" and function_of(test) not in clocked
        )
        self.callers: dict[tuple[str, str], set[str]] = {}
        for test in self.stable:
            for file, name in covered.calls.get(test, ()):
                self.callers.setdefault((file, name.partition(".<locals>")[0]), set()).add(test)

    @classmethod
    async def of(cls, backend: Backend, repo: Repository, stable: Collection[str] = ()) -> Workshop:
        """Put everything into a fresh box and run the tests there, twice; once more on a small share of a core, where
        it is not known which of them are `stable`."""
        box = await backend.create(HOST, LIMITS)
        try:
            await box.put({**site(), **placed({**repo.files, **repo.tests})})
            loop = asyncio.get_running_loop()
            started = loop.time()
            clean = await run(box, repo, seconds=300)
            seconds = loop.time() - started
            passed = stable or set(clean.passed()) & await _patient(backend, repo)
            return cls(box, repo, passed, clean, await run(box, repo, seconds=900, cover=True), seconds)
        except BaseException:
            await box.destroy()
            raise

    async def judge(self, chosen: Sequence[tuple[str, Edit]]) -> tuple[str, Report | None]:
        """Whether a bug makes a task, or why not; the report of its failures where it does."""
        tests = sorted(set[str]().union(*(self.callers[file, edit.function] for file, edit in chosen)))
        places = tests if len(tests) <= TESTS else sorted({test.partition("::")[0] for test in tests})
        changed = {file: _edited(self.repo, file, chosen) for file, _ in chosen}
        await self.box.put(placed(changed))
        try:
            reports = [await run(self.box, self.repo, places, 10 + SLOW * self.seconds) for _ in range(2)]
        finally:
            await self.box.put(placed({file: self.repo.files[file] for file in changed}))
        return self._verdict(reports)

    def _verdict(self, reports: Sequence[Report]) -> tuple[str, Report | None]:
        first, second = (self.failing(report) for report in reports)
        if any(report.status is None for report in reports):
            return "did not end", None
        if any(report.status not in (0, 1) for report in reports):
            return "cannot be imported", None
        if not first:
            return "no test fails", None
        if first != second:
            return "differs from run to run", None
        if len(first) > MOST_FAILING * len(self.stable):
            return "breaks too much", None
        return "admitted", reports[0]

    def failing(self, report: Report) -> list[str]:
        """The stable tests that fail."""
        return [test for test in self.stable if report.outcomes.get(test) == "failed"]


def with_clocks(repo: Repository) -> set[tuple[str, str]]:
    """File and name of the test functions that look at a clock."""
    found = set()
    for path, content in repo.tests.items():
        text = content.decode(errors="replace") if path.endswith(".py") else ""
        nodes = ast.walk(ast.parse(text)) if CLOCK.search(text) else ()
        functions = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        found |= {(path, one.name) for one in functions if CLOCK.search(ast.get_source_segment(text, one) or "")}
    return found


def function_of(test: str) -> tuple[str, str]:
    """File and function of a node id."""
    path, _, rest = test.partition("[")[0].partition("::")
    return path, rest.rpartition("::")[2]


async def _patient(backend: Backend, repo: Repository) -> set[str]:
    """The tests that pass on a small share of a core."""
    box = await backend.create(HOST, LIMITS.model_copy(update={"cpus": HURRY}))
    try:
        await box.put({**site(), **placed({**repo.files, **repo.tests})})
        return set((await run(box, repo, seconds=1800)).passed())
    finally:
        await box.destroy()


def _edited(repo: Repository, file: str, chosen: Iterable[tuple[str, Edit]]) -> bytes:
    return applied(repo.files[file].decode(), [edit for name, edit in chosen if name == file]).encode()


def _candidates(repo: Repository, workshop: Workshop, r: random.Random) -> list[list[tuple[str, Edit]]]:
    """Bugs in a random order in which the kinds of edits take turns; some are two edits of one file."""
    by_kind: dict[str, list[tuple[str, Edit]]] = {}
    for file in repo.sources:
        for edit in edits(repo.files[file].decode()):
            if (file, edit.function) in workshop.callers:
                by_kind.setdefault(edit.kind, []).append((file, edit))
    for found in by_kind.values():
        r.shuffle(found)
    order = [
        entry
        for place in range(max(map(len, by_kind.values()), default=0))
        for found in by_kind.values()
        for entry in found[place : place + 1]
    ]
    return [_combined(entry, order, r) for entry in order]


def _combined(entry: tuple[str, Edit], others: Sequence[tuple[str, Edit]], r: random.Random) -> list[tuple[str, Edit]]:
    file, edit = entry
    if r.random() >= COMBINED:
        return [entry]
    apart = [other for other in others if other[0] == file and (other[1].end < edit.start or other[1].start > edit.end)]
    return [entry, r.choice(apart)] if apart else [entry]


def _task(
    package: Package, chosen: Sequence[tuple[str, Edit]], report: Report, workshop: Workshop, seed: int
) -> dict[str, Any]:
    failing = workshop.failing(report)
    texts = [report.failures.get(test, "") for test in failing]
    level = 3 if len(chosen) > 1 else 1 if len(failing) >= 3 else 2
    changes = [{"file": file, **edit._asdict()} for file, edit in chosen]
    return {
        "edits": changes,
        "fail_to_pass": failing,
        "level": level,
        "issue": issue(package.name, level, chosen, dict(zip(failing, texts, strict=True))),
        "seed": seed,
    }


def read(path: Path) -> dict[str, Any]:
    """What a package's file holds. Raises UsageError where it cannot be read, or lacks something."""
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        lacking = HELD.difference(content) or {name for task in content["tasks"] for name in OF_TASK.difference(task)}
        problem = f"it lacks {', '.join(sorted(lacking))}" if lacking else ""
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        problem = str(error)
    if problem:
        raise UsageError(f"{path} cannot be used ({problem}); remove it, and make it anew: {making(path.parent)}")
    return content


def making(folder: Path) -> str:
    """The command that makes tasks in a folder."""
    return f"palaestra tasks build swe --output {folder}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, gzip.compress(json.dumps(content).encode(), mtime=0))
