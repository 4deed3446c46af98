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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from palaestra.environments.boxed import NEEDS, Boxed
from palaestra.environments.harbor_task import MIB, HarborTask, load, rewards, variables
from palaestra.environments.sandbox import dockerfile, images
from palaestra.environments.sandbox.backends import Backend, open_backend
from palaestra.gym.environment import Environment, metric, reward
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, BoxLimits, Entry
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Message, Source, Task

LOGS, TESTS = "/logs/verifier", "/tests"
DISK = 2048
"""MiB of a box's disk at the most: it is memory."""


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
        """The sandbox."""
        return open_backend(config.backend, NEEDS)

    async def setup(self, task: Task) -> None:
        """A box of the task's image."""
        self._folder = Path(task.data["folder"])
        self._harbor = load(self._folder)
        self._image = self.config.image or await image_of(self._folder, self._harbor, self.config.build)
        await super().setup(task)
        await self.box.exec(f"mkdir -p /logs/agent {LOGS} /logs/artifacts; {self._exports()}", 10)
        await self._begin(self.box)
        await self.box.exec(f"cd {shlex.quote(self._workdir())}", 5)

    async def _begin(self, box: Box) -> None:
        """The healthcheck, tried as often as the task says. Raises Failure(SANDBOX) where it never succeeds."""
        check = self._harbor.environment.healthcheck
        if check is None:
            return
        await asyncio.sleep(check.start_period_sec)
        for attempt in range(check.retries + 1):
            done = await box.exec(f"( {check.command}\n)", check.timeout_sec)
            if done.status == 0:
                return
            if attempt < check.retries:
                await asyncio.sleep(check.interval_sec)
        raise Failure(
            Cause.SANDBOX, f"{self._folder.name}: its healthcheck fails: {done.output[-300:].decode(errors='replace')}"
        )

    def _exports(self) -> str:
        return _exports(self._harbor.environment.env)

    def _workdir(self) -> str:
        return self._harbor.environment.workdir or images.find(self._image).config.workdir

    async def another_box(self) -> Box:
        """Another box of the task's image."""
        return await self._fresh(self._image)

    async def _fresh(self, image: str) -> Box:
        wants = self._harbor.environment
        limits = BoxLimits(
            memory=int(wants.memory_mb * MIB),
            disk=int(min(wants.storage_mb, DISK) * MIB),
            cpus=wants.cpus,
            processes=512,
        )
        return await self.resources.create(image, limits)  # type: ignore[no-any-return]

    @reward
    async def verified(self) -> float:
        """What the verifier wrote under `reward`, or the mean of what it wrote."""
        self._written = await self._verify()
        return self._written.get("reward", sum(self._written.values()) / len(self._written))

    @metric
    def parts(self) -> float:
        """How many rewards the verifier wrote."""
        return float(len(getattr(self, "_written", {})))

    async def _verify(self) -> dict[str, float]:
        """Run tests/test.sh where the task says. Raises Failure(VERIFIER) where it leaves no reward."""
        verifier = self._harbor.verifier
        for collect in verifier.collect:
            await self.box.exec(collect.command, collect.timeout_sec)
        if not verifier.separate:
            await self.box.exec("kill -9 $$", 5)  # what judges gets a shell of its own
            return await self._judged_in(self.box)
        image = await verifier_image(self._folder, self._harbor, self._image, self.config.build)
        box = await self._fresh(image)
        try:
            await box.put(await self._artifacts())
            return await self._judged_in(box)
        finally:
            await box.destroy()

    async def _artifacts(self) -> dict[str, Entry]:
        """What crosses: the declared paths, and /logs/artifacts."""
        changed = await self.box.diff()
        pairs = [(one.source, one.destination or one.source) for one in self._harbor.artifacts]
        pairs.append(("/logs/artifacts", "/logs/artifacts"))
        out: dict[str, Entry] = {}
        for source, destination in pairs:
            for path, entry in changed.items():
                if (
                    entry is not None
                    and entry.kind in ("file", "directory", "link")
                    and (path == source or path.startswith(f"{source}/"))
                ):
                    out[destination + path.removeprefix(source)] = entry
        return out

    async def _judged_in(self, box: Box) -> dict[str, float]:
        verifier = self._harbor.verifier
        await box.exec(f"rm -rf {TESTS} {LOGS}; mkdir -p {TESTS} {LOGS} /logs/artifacts", 10)
        await box.put({f"{TESTS}/{path}": entry for path, entry in _files(self._folder / "tests")})
        command = (
            f"( cd {shlex.quote(self._workdir())}; {self._exports()} {_exports(verifier.env)} bash {TESTS}/test.sh ) "
            f"> {LOGS}/test-stdout.txt 2>&1 < /dev/null"
        )
        done = await box.exec(command, verifier.timeout_sec)
        written = {}
        for name in ("reward.json", "reward.txt"):
            try:
                written[name] = await box.read(f"{LOGS}/{name}")
            except OSError:
                continue
        try:
            return rewards(written)
        except ValueError as error:
            said = f"; it ran longer than {verifier.timeout_sec:g} s" if done.stopped else ""
            raise Failure(Cause.VERIFIER, f"{self._folder.name}: {error}{said}") from None

    def solution(self, task: Task) -> list[str | Message] | None:
        """solution/solve.sh, where there is one, with the files beside it."""
        folder = Path(task.data["folder"]) / "solution"
        if not (folder / "solve.sh").exists():
            return None
        packed = base64.b64encode(_packed(folder)).decode()
        command = f"mkdir -p /solution && echo {packed} | base64 -d | tar -xz -C /solution && bash /solution/solve.sh"
        return [Message.calling("bash", command=command), "done"]


class Folders:
    """The task folders at a path: itself, or those in it."""

    def __init__(self, folder: Path) -> None:
        found = [folder] if (folder / "task.toml").exists() else sorted(p.parent for p in folder.glob("*/task.toml"))
        if not found:
            raise UsageError(f"harbor:{folder}: there is no task.toml there, nor in a folder of it")
        self._tasks = {path.name: _task(path) for path in found}

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def get(self, key: str) -> Task:
        """The task of a folder's name. Raises KeyError."""
        return self._tasks[key]


def _task(folder: Path) -> Task:
    load(folder)
    prompt = (folder / "instruction.md").read_text().strip()
    return Task(
        key=folder.name, prompt=prompt, data={"folder": str(folder.resolve())}, split=split_of(folder.name),
        source=Source(dataset=f"harbor:{folder.parent.name}"),
    )  # fmt: skip


def environment_class(path: str) -> type[Environment]:
    """The environment of `harbor:PATH`. Raises UsageError where there is no task."""
    folder = Path(path)
    Folders(folder)
    name = "Harbor_" + re.sub(r"\W", "_", folder.name)
    return type(name, (Harbor,), {"folder": folder.resolve(), "__doc__": Harbor.__doc__, "__module__": __name__})


_building: dict[str, asyncio.Lock] = {}


async def image_of(folder: Path, task: HarborTask, build: bool) -> str:
    """The name of the stored image of a task's environment; built from its Dockerfile where it lacks.

    Raises UsageError.
    """
    stated = task.environment.docker_image
    if stated and stated in images.names():
        return stated
    if not (folder / "environment" / "Dockerfile").exists():
        raise UsageError(
            f"{folder}: the image {stated} is not stored (palaestra sandbox image import), and there is no Dockerfile"
        )
    return await _built(folder / "environment", build)


async def verifier_image(folder: Path, task: HarborTask, agents: str, build: bool) -> str:
    """The image of a separate verifier: tests/Dockerfile, its own docker_image, or the agent's."""
    if (folder / "tests" / "Dockerfile").exists():
        return await _built(folder / "tests", build)
    own = task.verifier.environment
    return own.docker_image if own and own.docker_image else agents


async def _built(folder: Path, build: bool) -> str:
    digest = hashlib.sha256(b"".join(str(p).encode() + e.content for p, e in _files(folder))).hexdigest()[:16]
    name = f"harbor/{digest}"
    async with _building.setdefault(name, asyncio.Lock()):
        if name not in images.names():
            if not build:
                raise UsageError(f"{folder}: its image is not built, and config.build is false")
            await dockerfile.build(folder, name)
    return name


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


def _packed(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.add(folder, ".")
    return out.getvalue()


def _exports(env: Mapping[str, str]) -> str:
    filled = variables(env, os.environ)
    return "".join(f"export {name}={shlex.quote(value)}; " for name, value in filled.items())
