"""Harbor task folders, run as they are: `harbor:PATH` is the environment of a task's folder, or of a folder of such."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import re
import shlex
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from palaestra.environments.boxed import GRACE, NEEDS, VISITS, Boxed
from palaestra.environments.harbor_artifacts import ALWAYS, VERIFIERS, after, cross, crossing, emptied, ways
from palaestra.environments.harbor_task import MIB, HarborTask, Surroundings, load, rewards, timeouts, variables
from palaestra.environments.sandbox import dockerfile, images
from palaestra.environments.sandbox.backends import Backend, open_backend
from palaestra.gym.environment import Environment, metric, reward, tool
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, BoxLimits, Destroyed, Entry
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Message, Source, Task

TESTS, LOGS = VERIFIERS
SAID = 3
"""How many tasks that are left out a warning names."""
DISK = 2048
"""MiB of a box's disk at the most: it is memory."""


class Place(NamedTuple):
    """Where commands run: a stored image, what the task says of its box, and further variables."""

    image: str
    wants: Surroundings
    env: Mapping[str, str] = {}

    @property
    def workdir(self) -> str:
        """The folder that commands begin in."""
        return self.wants.workdir or images.find(self.image).config.workdir

    @property
    def limits(self) -> BoxLimits:
        """Of its box."""
        return BoxLimits(
            memory=int(self.wants.memory_mb * MIB), disk=int(min(self.wants.storage_mb, DISK) * MIB),
            cpus=self.wants.cpus, processes=512,
        )  # fmt: skip

    def exports(self) -> str:
        """Shell commands that set its variables. Raises UsageError where one of them takes what is not set here."""
        filled = variables({**self.wants.env, **self.env}, os.environ)
        return "".join(f"export {name}={shlex.quote(value)}; " for name, value in filled.items())

    def enter(self) -> str:
        """Shell commands that go to its folder and set its variables."""
        return f"cd {shlex.quote(self.workdir)}; {self.exports()}"

    def inside(self, command: str) -> str:
        """A command in its folder, with its variables."""
        return f"( {self.enter()}{command}\n)"


class Harbor(Boxed):
    """A Harbor task: do in a shell what the instruction asks. Reply without a tool call when all is done."""

    folder: ClassVar[Path] = Path()

    class Config(BaseModel):
        """`backend` of the sandbox; `image`: use this stored image, whatever the tasks name; `build`: whether a task's
        Dockerfile is run where its image is not stored; `seconds` that one command may take."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        backend: str = "auto"
        image: str = ""
        build: bool = True
        seconds: float = Field(default=60.0, gt=0)
        shown: int = Field(default=8000, ge=100)

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """The tasks of the folder."""
        return Folders(cls.folder)

    @classmethod
    async def open(cls, config: Any) -> Backend:
        """The sandbox. Raises UsageError for an image that is none of those stored."""
        if config.image == images.HOST:
            raise UsageError(f"config.image: Harbor tasks need a stored image, not {config.image!r}; leave it out")
        return open_backend(config.backend, NEEDS)

    def deadlines(self, task: Task) -> Mapping[str, float]:
        """What the task's own timeouts come to."""
        own = timeouts(load(Path(task.data["folder"])))
        return {**super().deadlines(task), "setup": own["setup"] + GRACE, "judge": own["judge"] + GRACE + VISITS}

    async def setup(self, task: Task) -> None:
        """A box of the task's image. Raises UsageError for an image, the verifier's too, that is not to be had."""
        self._folder = Path(task.data["folder"])
        self._harbor = load(self._folder)
        wants, verifier = self._harbor.environment, self._harbor.verifier
        image = self.config.image or await image_of(self._folder, self._harbor, self.config.build)
        self._place = Place(image, wants)
        judging = await verifier_image(self._folder, self._harbor, image, self.config.build)
        self._judging = Place(judging, (verifier.separate and verifier.environment) or wants, verifier.env)
        self._judging.exports()  # a variable that is not set is missed now, not after the agent's work
        self._ways = ways(self._harbor.artifacts, images.find(image).root, self._place.workdir)
        await super().setup(task)
        await self.box.exec(f"mkdir -p /logs/agent {LOGS} {ALWAYS}", 10)
        await self._begin(self.box, self._place)

    @tool
    async def bash(self, command: str) -> str:
        """Run a command in the shell."""
        return await super().bash(f'[ "$palaestra" ] || {{ palaestra=1; {self._place.enter()}}}\n{command}')

    async def _begin(self, box: Box, place: Place) -> None:
        """The healthcheck, tried as often as the task says. Raises Failure(SANDBOX) where it never succeeds."""
        check = place.wants.healthcheck
        if check is None:
            return
        await asyncio.sleep(check.start_period_sec)
        for attempt in range(check.retries + 1):
            done = await box.exec(place.inside(check.command), check.timeout_sec)
            if done.status == 0:
                return
            if attempt < check.retries:
                await asyncio.sleep(check.interval_sec)
        raise Failure(
            Cause.SANDBOX, f"{self._folder.name}: its healthcheck fails: {done.output[-300:].decode(errors='replace')}"
        )

    async def another_box(self) -> Box:
        """Another box of the task's image."""
        return await self._fresh(self._place)

    async def _fresh(self, place: Place) -> Box:
        return await self.resources.create(place.image, place.limits)  # type: ignore[no-any-return]

    async def alive(self) -> bool:
        """Whether the verifier gives a reward where nobody has worked. Where there is a solution, the canary has that
        judged instead."""
        if self.solution(self.task) is None:
            try:
                await self.setup(self.task)
                await self.verified()
            finally:
                await self.close()
        return True

    @reward
    async def verified(self) -> float:
        """What the verifier wrote under `reward`, or the mean of what it wrote.

        Raises Failure(VERIFIER) where it gave no reward, be it that what the agent left could not be taken in; the
        canary says whose doing that is (gym/episode.py).
        """
        try:
            self._written = await self._verify()
        except (OSError, ValueError, Destroyed) as error:
            raise Failure(Cause.VERIFIER, f"{self._folder.name}: {getattr(error, 'detail', error)}") from error
        return self._written.get("reward", sum(self._written.values()) / len(self._written))

    @metric
    def parts(self) -> float:
        """How many rewards the verifier wrote."""
        return float(len(getattr(self, "_written", {})))

    async def _verify(self) -> dict[str, float]:
        """Run tests/test.sh where the task says; collectors before it, and each in a shell that the agent did not have.

        Raises ValueError where it leaves no reward, OSError where a box does not give or take what it should.
        """
        verifier = self._harbor.verifier
        for collect in verifier.collect:
            await self.box.renew()
            await self.box.exec(self._place.inside(collect.command), collect.timeout_sec)
        if not verifier.separate:
            await self.box.renew()
            return await self._judged_in(self.box)
        box = await self._fresh(self._judging)
        try:
            if verifier.environment:
                await self._begin(box, self._judging)
            await cross(box, *await asyncio.to_thread(self._crossing, await self.box.diff()))
            return await self._judged_in(box)
        finally:
            await box.destroy()

    def _crossing(self, changes: Mapping[str, Entry | None]) -> tuple[dict[str, Entry], list[str]]:
        """What crosses, be it that the agent left it as it was given; and where something of what it was given stands
        in its place."""
        given = {source: images.tree(self._place.image, source) for source in self._ways}
        entries = crossing(
            after({path: one for tree in given.values() for path, one in tree.items()}, changes), self._ways
        )
        return entries, [
            to for source, to in self._ways.items() if to not in VERIFIERS and (given[source] or to in entries)
        ]

    async def _judged_in(self, box: Box) -> dict[str, float]:
        own = self._judging.image != self._place.image
        if own and images.tree(self._judging.image, f"{TESTS}/test.sh"):  # it brings its tests along
            await emptied(box, LOGS)
        else:
            await emptied(box, LOGS, TESTS)
            await box.put({f"{TESTS}/{path}": entry for path, entry in _files(self._folder / "tests")})
        seconds = self._harbor.verifier.timeout_sec
        command = self._judging.inside(f"bash {TESTS}/test.sh")
        done = await box.exec(f"{command} > {LOGS}/test-stdout.txt 2>&1 < /dev/null", seconds)
        written = {}
        for name in ("reward.json", "reward.txt"):
            try:
                written[name] = await box.read(f"{LOGS}/{name}")
            except OSError:
                continue
        try:
            return rewards(written)
        except ValueError as error:
            late = f"; it ran longer than {seconds:g} s" if done.stopped else ""
            raise ValueError(f"{error}{late}") from None

    def solution(self, task: Task) -> list[str | Message] | None:
        """solution/solve.sh, where there is one, with the files beside it."""
        folder = Path(task.data["folder"]) / "solution"
        if not (folder / "solve.sh").exists():
            return None
        packed = base64.b64encode(_packed(folder)).decode()
        command = f"mkdir -p /solution && echo {packed} | base64 -d | tar -xz -C /solution && bash /solution/solve.sh"
        return [Message.calling("bash", command=command), "done"]


class Folders:
    """The task folders at a path: itself, or those in it; those that cannot be played here are left out with a warning.
    Raises UsageError where none is left."""

    def __init__(self, folder: Path) -> None:
        found = _folders(folder)
        self._tasks: dict[str, Task] = {}
        left_out = []
        for path in found:
            try:
                self._tasks[path.name] = _task(path)
            except UsageError as reason:
                left_out.append(reason)
        if not self._tasks:
            raise left_out[0]
        if left_out:
            words = "; ".join(map(str, left_out[:SAID]))
            warnings.warn(f"harbor:{folder}: {len(left_out)} of {len(found)} tasks are left out: {words}", stacklevel=2)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def get(self, key: str) -> Task:
        """The task of a folder's name. Raises KeyError."""
        return self._tasks[key]


def _folders(folder: Path) -> list[Path]:
    found = [folder] if (folder / "task.toml").exists() else sorted(p.parent for p in folder.glob("*/task.toml"))
    if not found:
        raise UsageError(f"harbor:{folder}: there is no task.toml there, nor in a folder of it")
    return found


def _task(folder: Path) -> Task:
    load(folder)
    prompt = (folder / "instruction.md").read_text().strip()
    data = {"folder": str(folder.resolve()), "sha256": _digest(folder)}
    source = Source(dataset=f"harbor:{folder.parent.name}")
    return Task(key=folder.name, prompt=prompt, data=data, split=split_of(folder.name), source=source)


def environment_class(path: str) -> type[Environment]:
    """The environment of `harbor:PATH`. Raises UsageError where there is no task; what is wrong in one, its task set
    says."""
    folder = Path(path)
    _folders(folder)
    name = "Harbor_" + re.sub(r"\W", "_", folder.name)
    return type(name, (Harbor,), {"folder": folder.resolve(), "__doc__": Harbor.__doc__, "__module__": __name__})


_building: dict[str, asyncio.Lock] = {}


async def image_of(folder: Path, task: HarborTask, build: bool) -> str:
    """The name of the stored image of a task's environment; built from its Dockerfile where it lacks.

    Raises UsageError.
    """
    return await _image(folder / "environment", task.environment, "environment", build)


async def verifier_image(folder: Path, task: HarborTask, agents: str, build: bool) -> str:
    """The image of a separate verifier: its own docker_image, or of tests/Dockerfile, or else the agent's, which a
    shared one has, too. Raises UsageError."""
    own, tests = task.verifier.environment, folder / "tests"
    if not task.verifier.separate or not ((own and own.docker_image) or (tests / "Dockerfile").exists()):
        return agents
    wants = own or Surroundings(build_timeout_sec=task.environment.build_timeout_sec)
    return await _image(tests, wants, "verifier.environment" if own else "environment", build)


async def _image(folder: Path, wants: Surroundings, key: str, build: bool) -> str:
    """The stored image that a table of task.toml names, or one that is built from the Dockerfile of its folder."""
    stated = wants.docker_image
    if stated and stated in images.names():
        return stated
    if not (folder / "Dockerfile").exists():
        lack = f"the image {stated} is not stored (palaestra sandbox image import)" if stated else "it names no image"
        raise UsageError(f"{folder.parent}: {lack} ({key}.docker_image), and there is no {folder.name}/Dockerfile")
    name = f"{images.HARBOR}{_digest(folder)}"
    async with _building.setdefault(name, asyncio.Lock()):
        if name not in images.names():
            if not build:
                raise UsageError(f"{folder}: its image is not built, and config.build is false")
            await _built(folder, name, wants.build_timeout_sec, f"{key}.build_timeout_sec")
    return name


async def _built(folder: Path, name: str, seconds: float, key: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            await dockerfile.build(folder, name)
    except TimeoutError:
        raise UsageError(f"{folder}: its Dockerfile takes longer than {seconds:g} s ({key} in task.toml)") from None


def _digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(str(p).encode() + e.content for p, e in _files(folder))).hexdigest()[:16]


def _files(folder: Path) -> list[tuple[str, Entry]]:
    found = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode & 0o777
        kind = "directory" if path.is_dir() else "file"
        found.append(
            (
                str(path.relative_to(folder)),
                Entry(
                    kind, mode | 0o500 if path.suffix == ".sh" else mode, b"" if path.is_dir() else path.read_bytes()
                ),
            )
        )
    return found


def _roots(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """As root's, whoever owns it here: a box may have no other users."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _packed(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.add(folder, ".", filter=_roots)
    return out.getvalue()
