"""What native boxes and containers have in common: a shell for commands, and visitors for files and services."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from palaestra.environments.sandbox import archives, processes
from palaestra.environments.sandbox.launching import Launching
from palaestra.environments.sandbox.shell import Ended, Shell, Streams
from palaestra.environments.sandbox.visitor import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import READ, BoxLimits, Entry, Executed, Process

SHM, COLLECTED = 64 << 20, 256 << 20
"""Bytes of shared memory; of all changed files together."""
KEPT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL", "NET_BIND_SERVICE")
ENVIRONMENT = {"HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
DYING = 2.0
"""Seconds in which a process that is being killed is gone."""
FILES = 1024
"""Open files of a process."""


class VisitedBox(ABC):
    """A live box whose init this machine can see. `owns`: the namespaces of its own that every visitor enters."""

    owns = CLONE_NEWUSER

    def __init__(
        self, launching: Launching, init: int, streams: Streams, limits: BoxLimits, token: str, marks: bool = False
    ) -> None:
        self.init = init
        self._launching = launching
        self._namespace = processes.namespace(init)
        self._handle = os.pidfd_open(init)
        self._destroyed = False
        self.shell = Shell(streams, limits.output, self._stop, token, marks)

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        try:
            return await self.shell.exec(command, timeout)
        except Ended:
            raise await self._lost() from None

    async def renew(self) -> None:
        """See Box.renew."""
        await self.shell.renew(self._end_shell)

    def _end_shell(self) -> None:
        with suppress(OSError):
            processes.kill(processes.shells(processes.inside(self._namespace), self.init))

    async def read(self, path: str) -> bytes:
        """See Box.read."""
        return await self._visit({"visit": "read", "path": path, "limit": READ}, CLONE_NEWNS)

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """See Box.put."""
        await self._visit({"visit": "put"}, CLONE_NEWNS, archives.packed(entries))

    async def write(self, path: str, content: str | bytes) -> None:
        """See Box.write."""
        await self.put({path: Entry("file", 0o644, content.encode() if isinstance(content, str) else content)})

    async def processes(self) -> list[Process]:
        """See Box.processes."""
        return processes.described(processes.inside(self._namespace))

    async def ask(self, port: int, request: bytes, timeout: float) -> bytes:
        """See Box.ask."""
        return await self._visit({"visit": "ask", "port": port, "timeout": timeout}, CLONE_NEWNET, request)

    async def _visit(self, request: Mapping[str, Any], enter: int, content: bytes = b"") -> bytes:
        return await self._visited({**request, "enter": self.owns | enter}, self._handle, content)

    async def _visited(self, request: Mapping[str, Any], target: int, content: bytes = b"") -> bytes:
        if self._gone():
            raise await self._lost()
        try:
            return await self._launching.visit(request, target, content)
        finally:
            if self._gone():  # what a visitor finds in a box that is being taken down is nothing
                raise await self._lost() from None

    async def _stays(self) -> bool:
        """Whether the box is still there after the moment in which one that is being killed goes."""
        end = time.monotonic() + DYING
        while not self._gone():
            if time.monotonic() > end:
                return True
            await asyncio.sleep(0.02)
        return False

    def _gone(self) -> bool:
        return self._destroyed or processes.dead(self.init, self._namespace)

    def _stop(self, since: float) -> None:
        with suppress(OSError):
            processes.stop(partial(processes.inside, self._namespace), since, (self.init,))

    @abstractmethod
    async def _lost(self) -> Exception:
        """Why the box is gone."""


async def silence(launching: Launching, init: int, owns: int) -> None:
    """Take a box's loopback down, which the box may not bring up again. Raises Failure(SANDBOX)."""
    try:
        handle = os.pidfd_open(init)
        try:
            await launching.visit({"visit": "silence", "enter": owns | CLONE_NEWNET}, handle, b"")
        finally:
            os.close(handle)
    except OSError as error:
        raise Failure(Cause.SANDBOX, f"the box keeps its loopback: {error}") from error
