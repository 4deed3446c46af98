"""Repair a repository: find a bug from a report, and change the source so that hidden tests pass."""

from __future__ import annotations

import functools
import random
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from palaestra.environments.boxed import GRACE, NEEDS, VISITS, Boxed, shown
from palaestra.environments.sandbox.backends import Backend, open_backend
from palaestra.environments.swe.build import LIMITS, build_all, making, read
from palaestra.environments.swe.copies import Hiding, copies_in
from palaestra.environments.swe.repository import repository, whole
from palaestra.environments.swe.tests_run import REPO, placed
from palaestra.environments.swe.verify import expected, repair, repaired
from palaestra.gym.environment import Progress, ToolError, metric, reward, tool
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError, suggest
from palaestra.gym.sandbox import BoxLimits
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Message, Source, Task
from palaestra.tasks.repair import exercism, quixbugs, small

REAL = {"quixbugs": quixbugs, "exercism": exercism}
COMMIT = (
    f"cd {REPO} && git init -q -b main && git config user.name dev && git config user.email dev@example.com && "
    "git add -A && git commit -q -m 'Import' --date '2020-01-01T00:00:00Z'"
)
SMALL_SECONDS = 60.0
"""How long the tests of a repository that is no package may take, where `judging` does not say less."""
ASKED = "The repository lies in /work/repo. Change its source, then call submit."


class Swe(Boxed):
    """Repair the repository in /work/repo as the report asks: look with bash and view, change with edit, submit."""

    class Config(Boxed.Config):
        """`source`: bugs in packages, QuixBugs, Exercism, or small ones that are generated; `folder`: where `palaestra
        tasks build swe` wrote tasks (default: those that ship); `levels` and `packages` to choose among them (none
        named: all); `backend` of the sandbox, `image` and `limits` of its boxes, of which `warm` are made ahead;
        `seconds` that one command may take, `judging` the tests; `shown`: characters of output that the policy sees."""

        source: Literal["packages", "quixbugs", "exercism", "small"] = "packages"
        folder: str = ""
        levels: tuple[int, ...] = (1, 2, 3)
        packages: tuple[str, ...] = ()
        seconds: float = Field(default=60.0, gt=0)
        judging: float = Field(default=600.0, gt=0)
        limits: BoxLimits = LIMITS

    _changed = 0

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """The built tasks, or real ones."""
        if config.source == "small":
            return small(config.levels)
        if config.source in REAL:
            return REAL[config.source]()
        return Built(Path(config.folder) if config.folder else shipped(), config.packages, config.levels)

    @classmethod
    async def build(cls, count: int, seed: int, folder: Path | None, say: Progress) -> str:
        """Make tasks from the packages of environments/swe/packages.py."""
        backend = open_backend("auto", NEEDS)
        try:
            return await build_all(backend, count, folder or shipped(), seed, say)
        finally:
            await backend.close()

    @classmethod
    def programs(cls, config: Any) -> Iterable[str]:
        """What tasks use."""
        return ("git", "python3")

    @classmethod
    async def open(cls, config: Any) -> Backend:
        """The sandbox, in which no package lies that tasks break. Raises UsageError as Boxed.open does."""
        backend = await super().open(config)
        if config.source != "packages":
            return backend
        try:
            box = await backend.create(config.image, config.limits)
            copies = await copies_in(box, {task.data["package"] for task in cls.task_set(config)})
            await box.destroy()
        except BaseException:
            await backend.close()
            raise
        return Hiding(backend, copies) if copies else backend

    def deadlines(self, task: Task) -> Mapping[str, float]:
        """Judging takes as long as the tests may."""
        return {**super().deadlines(task), "judge": self._judging(task) + GRACE + VISITS}

    def _judging(self, task: Task) -> float:
        seconds: float = self.config.judging
        return seconds if "package" in task.data else min(seconds, SMALL_SECONDS)

    async def setup(self, task: Task) -> list[Message]:
        """A fresh box with the repository in one commit, the tests left out."""
        self._repo = repository(task.data)
        await super().setup(task)
        await self.box.put(placed(self._repo.files))
        done = await self.box.exec(COMMIT, self.config.seconds)
        if done.status:
            raise Failure(
                Cause.SANDBOX, f"the repository cannot be committed: {done.output[-300:].decode(errors='replace')}"
            )
        await self.box.exec(f"cd {REPO}", 5)
        self._baseline = await self.box.diff()
        return []

    @tool
    async def view(self, path: str, start: int = 1, end: int = 200) -> str:
        """Show lines of a file, numbered, from start to end."""
        lines = (await self._read(path)).splitlines()
        if start < 1 or start > max(1, len(lines)):
            raise ToolError(f"{path} has {len(lines)} lines; start must be among them")
        return shown(
            "\n".join(f"{n}\t{line}" for n, line in enumerate(lines[start - 1 : end], start)).encode(),
            self.config.shown,
        )

    @tool
    async def edit(self, path: str, old: str, new: str) -> str:
        """Replace a text that stands exactly once in a file."""
        text = await self._read(path)
        count = text.count(old)
        if not old or count != 1:
            raise ToolError(
                f"old stands {count} times in {path}; it must stand there exactly once" if old else "old is empty"
            )
        try:
            await self.box.write(_place(path), text.replace(old, new))
        except (OSError, ValueError) as error:
            raise ToolError(f"cannot write {path}: {error}") from None
        return f"{path} is changed"

    @tool(ends=True)
    async def submit(self) -> str:
        """Hand the repository in as it is now. This ends the task."""
        return "submitted"

    async def _read(self, path: str) -> str:
        try:
            return (await self.box.read(_place(path))).decode()
        except (OSError, ValueError) as error:
            raise ToolError(f"cannot read {path}: {error}") from None

    @reward
    async def repaired(self, task: Task) -> float:
        """1 if the tests that failed pass, and all others still do."""
        return float(not await self._problem(task))

    @metric
    def changed(self) -> float:
        """How many source files were changed."""
        return float(self._changed)

    async def _repair(self) -> dict[str, bytes | None]:
        after = await self.box.diff()
        gone = {path: None for path in self._baseline if path not in after}
        return repair(self._repo, {**gone, **{p: e for p, e in after.items() if self._baseline.get(p, 0) != e}})

    async def _problem(self, task: Task) -> str:
        try:
            made = await self._repair()
        except OSError as error:
            return str(error)
        self._changed = len(made)
        if not made:
            return "no source file was changed"
        box = await self.another_box()
        try:
            return await repaired(box, self._repo, made, expected(task.data), self._judging(task))
        finally:
            await box.destroy()

    def solution(self, task: Task) -> list[Message]:
        """The files as they were before the bug."""
        clean = (
            whole(task.data["package"]).files
            if "package" in task.data
            else {p: t.encode() for p, t in task.data["solution"].items()}
        )
        broken = repository(task.data).files
        changed = [path for path in clean if clean[path] != broken.get(path)]
        commands = [
            f"printf %s {shlex.quote(clean[path].decode())} > {shlex.quote(f'{REPO}/{path}')}" for path in changed
        ]
        return [*(Message.calling("bash", command=command) for command in commands), Message.calling("submit")]

    def demonstrations(self, task: Task, generator: random.Random) -> Sequence[Message]:
        """Where one line is wrong: look at the file, change the line, submit. Else the solution."""
        changes = [
            (path, *line)
            for path, text in task.data.get("solution", {}).items()
            for line in _differing(task.data["files"].get(path, ""), text)
        ]
        if len(changes) != 1 or not all(changes[0]) or task.data["files"][changes[0][0]].count(changes[0][1]) != 1:
            return self.solution(task)
        path, old, new = changes[0]
        return [
            Message.calling("view", path=path),
            Message.calling("edit", path=path, old=old, new=new),
            Message.calling("submit"),
        ]


def _differing(old: str, new: str) -> list[tuple[str, str]]:
    """The lines in which two texts differ, stripped; an empty one stands for a line that a text lacks."""
    pairs = list(zip_longest(old.splitlines(), new.splitlines(), fillvalue=""))
    return [(one.strip(), other.strip()) for one, other in pairs if one != other]


class Built:
    """The tasks in a folder of packages' files. Raises UsageError where there are none, or one cannot be used."""

    def __init__(self, folder: Path, packages: Sequence[str] = (), levels: Sequence[int] = ()) -> None:
        paths = sorted(folder.glob("*.json.gz"))
        if not paths:
            lacks = "holds no *.json.gz" if folder.is_dir() else "is no folder"
            raise UsageError(f"{folder} {lacks}; make tasks there: {making(folder)}")
        self._tasks = {task.key: task for path in paths for task in _tasks(path)}
        known = {task.data["package"] for task in self._tasks.values()}
        for name in packages:
            if name not in known:
                raise UsageError(f"no tasks of package {name!r} in {folder}: {suggest(name, known)}")
        self._chosen = [
            task
            for task in self._tasks.values()
            if (not packages or task.data["package"] in packages) and (not levels or task.difficulty in levels)
        ]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._chosen)

    def get(self, key: str) -> Task:
        """The task of that key. Raises KeyError."""
        return self._tasks[key]


@functools.lru_cache(maxsize=64)
def _tasks(path: Path) -> list[Task]:
    content = read(path)
    source = Source(dataset=f"{content['name']} {content['version']}", licence=content["licence"])
    return [_task(content, number, made, source) for number, made in enumerate(content["tasks"])]


def _task(content: dict[str, Any], number: int, made: dict[str, Any], source: Source) -> Task:
    name = f"{content['name']}-{number}"
    stable = [test for test in content["stable"] if test not in set(made["fail_to_pass"])]
    kept = {name: made[name] for name in ("edits", "fail_to_pass")}
    data = {"package": content["name"], **kept, "stable": stable, "skips": content["skips"]}
    prompt = f"{made['issue']}\n\n{ASKED}"
    return Task(key=name, prompt=prompt, data=data, split=split_of(name), difficulty=made["level"], source=source)


def shipped() -> Path:
    """The folder of the tasks that ship."""
    return Path(str(files("palaestra.tasks").joinpath("data", "swe")))


def _place(path: str) -> str:
    return path if path.startswith("/") else f"{REPO}/{path}"
