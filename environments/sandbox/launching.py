"""The owner's end of the launcher: starts it with the first box, and asks it for boxes and for visits to them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox import cgroups, processes, seccomp
from palaestra.gym.outcome import Cause, Failure

SECONDS, VISIT_SECONDS = 15.0, 60.0
STATUS_SECONDS = 2.0
AT_ONCE = 8
"""Requests under way: the launcher serves one after the other, and more would not fit into its socket."""
MESSAGE = 60_000
"""Bytes of a request."""
STAGES = Path("/tmp")
STAGE = "palaestra-boxes-"


class Launching:
    """Starts the launcher, speaks with it, and starts another where it has ended. `backend`: whose boxes these are."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._boxes: dict[int, asyncio.Future[int]] = {}
        """By monitor: how the box's first process ended, once it has."""
        self._numbers = itertools.count()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.stage = STAGES / f"{STAGE}{os.getpid()}-{processes.started(os.getpid())}-{id(self):x}"
        """The folder over which every box mounts its own disk; empty out here."""

    @property
    def lives(self) -> bool:
        """Whether the launcher runs, and so whatever box was not ended otherwise."""
        return self._channel is not None

    async def launch(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        """A box's init and monitor by their numbers. Raises Failure(SANDBOX) with what went wrong."""
        async with self._gate:
            number = next(self._numbers)
            answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._waiting[number] = answer
            try:
                self._ask({**request, "id": number}, descriptors)
                found = await asyncio.wait_for(answer, SECONDS)
            except (OSError, TimeoutError) as error:
                text = str(error) or f"nothing for {SECONDS:g} s"
                raise Failure(Cause.SANDBOX, f"{self._backend}: the launcher does not answer: {text}") from error
            finally:
                del self._waiting[number]
        if "error" in found:
            raise Failure(Cause.SANDBOX, f"{self._backend}: {found['error']}")
        self._boxes[found["monitor"]] = asyncio.get_running_loop().create_future()
        return found

    async def status(self, monitor: int) -> int | None:
        """How a box's first process ended: its exit status, 128 and the signal that killed it; None where that is not
        known."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._boxes[monitor]), STATUS_SECONDS)
        return None

    def forget(self, monitor: int) -> None:
        """Nobody asks for this box any more."""
        del self._boxes[monitor]

    async def visit(self, request: Mapping[str, Any], target: int, content: bytes) -> bytes:
        """What a visitor of a box (`target`: the handle of a process of it) answers to `content`.

        Raises OSError with what it says went wrong, Failure(SANDBOX) where it does not come to its end.
        """
        async with self._gate:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                try:
                    self._ask(request, [target, theirs.fileno()])
                    theirs.close()
                    async with asyncio.timeout(VISIT_SECONDS):
                        said = await _exchange(ours, content)
                except (ConnectionError, TimeoutError) as error:
                    why = str(error) or f"nothing for {VISIT_SECONDS:g} s"
                    raise Failure(Cause.SANDBOX, f"{self._backend}: {request['visit']}: {why}") from error
        answer, _, last = said.rpartition(b"\n")
        if last == b"ok":
            return answer
        if last.startswith(b"error "):
            raise OSError(last.removeprefix(b"error ").decode(errors="replace"))
        raise Failure(Cause.SANDBOX, f"{self._backend}: {request['visit']}: the visitor of the box's files died")

    def _ask(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        content = json.dumps(dict(request)).encode()
        if len(content) > MESSAGE:
            raise OSError(f"a request of {len(content)} bytes is too long (is it a path?)")
        socket.send_fds(self._channel or self._start(), [content], list(descriptors))

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stage.mkdir(mode=0o711, exist_ok=True)  # a box's root is another user
        launcher = str(Path(__file__).with_name("launcher.py"))
        command = [sys.executable, "-I", "-S", launcher, str(theirs.fileno())]
        # a session of its own: Ctrl-C is ours, and no box's
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={}, cwd="/", start_new_session=True)
        theirs.close()
        config = {"stage": str(self.stage), "bwrap": shutil.which("bwrap"), "filter": seccomp.program().hex()}
        ours.send(json.dumps(config).encode())
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._read)
        self._channel = ours
        return ours

    def _read(self) -> None:
        assert self._channel is not None
        content = b""
        with suppress(ConnectionError):
            content = self._channel.recv(1 << 16)
        if not content:
            self._end()
            for future in self._waiting.values():
                if not future.done():
                    future.set_result({"error": "the launcher ended"})
            return
        answer = json.loads(content)
        if "ended" in answer:
            if answer["ended"] in self._boxes:
                self._boxes[answer["ended"]].set_result(answer["status"])
            return
        asked = self._waiting.get(answer["id"])
        if asked is not None and not asked.done():
            asked.set_result(answer)
        elif "monitor" in answer:  # nobody waits for this box any more
            with suppress(ProcessLookupError):
                os.kill(answer["pid"], signal.SIGKILL)  # the init: its bubblewrap alone might leave it behind

    def close(self) -> None:
        """End the launcher, and with it every box."""
        self._end()
        with suppress(OSError):
            self.stage.rmdir()

    def _end(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
        if self._process is not None:
            self._process.wait()
        self._process = self._channel = None


async def _exchange(peer: socket.socket, content: bytes) -> bytes:
    """Send, and read to the end; who no longer listens may still have said why."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        if content:
            await loop.sock_sendall(peer, content)
        peer.shutdown(socket.SHUT_WR)
    parts = []
    with suppress(ConnectionResetError):
        while part := await loop.sock_recv(peer, 1 << 20):
            parts.append(part)
    return b"".join(parts)


def sweep() -> None:
    """Remove the folders whose owner is gone."""
    for folder in STAGES.glob(f"{STAGE}*-*-*"):
        pid, began, _ = folder.name.removeprefix(STAGE).split("-")
        if not cgroups.lives(int(pid), began):
            with suppress(OSError):
                folder.rmdir()
