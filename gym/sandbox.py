"""The sandbox protocol: a box in which an agent's commands run. Backends live in environments/sandbox/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple, Protocol

from pydantic import Field

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.types import Record

READ = 10 << 20
"""Bytes of the largest file that a box gives."""


class BoxLimits(Record):
    """What one box may use; bytes unless the name says otherwise. `output`: of one command, kept; `loopback`: whether
    the box has a network of its own, which leads nowhere else, or none; `hidden`: files, and folders (with
    a / at the end), of the image that the box does not see."""

    memory: int = Field(default=512 << 20, gt=0)
    disk: int = Field(default=256 << 20, gt=0)
    inodes: int = Field(default=50_000, gt=0)
    processes: int = Field(default=128, gt=0)
    cpus: float = Field(default=1.0, gt=0)
    output: int = Field(default=1 << 20, gt=0)
    loopback: bool = True
    hidden: tuple[Annotated[str, Field(pattern="^/.")], ...] = ()


class Capabilities(Record):
    """What a backend enforces. An environment that needs more than its backend gives is refused, with the reason."""

    isolation: bool = False
    memory: bool = False
    disk_quota: bool = False
    processes: bool = False
    no_network: bool = False


class Executed(NamedTuple):
    """A finished command: exit status (128 + n for signal n), output of both streams, whether it was stopped: because
    its time ran out, or because it wrote far more than is kept."""

    status: int
    output: bytes
    stopped: bool


class Destroyed(Failure):
    """The box was ended by what ran in it, its memory used up, say: the policy's doing, not the machine's, so it earns
    0."""

    def __init__(self, detail: str) -> None:
        super().__init__(Cause.POLICY_CRASH, detail)


class Entry(NamedTuple):
    """What stands at a path: `kind` is file, directory, link or other; `mode` the permission bits; `content` of a file,
    of a link its target."""

    kind: str
    mode: int
    content: bytes = b""
    uid: int = 0
    gid: int = 0


class Process(NamedTuple):
    """A process of a box: its number there, and its arguments."""

    pid: int
    arguments: tuple[str, ...]


class Box(Protocol):
    """One live sandbox. Whatever goes wrong with it raises Failure(SANDBOX); Destroyed, where its commands did it."""

    async def exec(self, command: str, timeout: float) -> Executed:
        """Run a shell command in the box's persistent shell, for `timeout` seconds at most."""
        ...

    async def renew(self) -> None:
        """End the shell from outside: the next command has one that knows nothing of earlier ones. What they left
        running goes on."""
        ...

    async def read(self, path: str) -> bytes:
        """A regular file's content. Raises OSError for anything else, and for a file of more than READ bytes."""
        ...

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """Create or replace what stands at the paths; folders above them are made where they lack."""
        ...

    async def write(self, path: str, content: str | bytes) -> None:
        """Create or replace a file."""
        ...

    async def diff(self) -> Mapping[str, Entry | None]:
        """The paths that changed since the box was made, absolute, with what stands there; None for a removed one."""
        ...

    async def processes(self) -> list[Process]:
        """Who runs in the box, its init and shell included, as the host sees them."""
        ...

    async def ask(self, port: int, request: bytes, timeout: float) -> bytes:
        """What a service at a port of the box's loopback answers until it closes. Raises OSError."""
        ...

    async def destroy(self) -> None:
        """Kill everything in the box and give it back. Idempotent."""
        ...


class Sandbox(Protocol):
    """A backend."""

    capabilities: Capabilities

    async def create(self, image: str, limits: BoxLimits) -> Box:
        """A fresh box. Raises Failure(SANDBOX)."""
        ...
