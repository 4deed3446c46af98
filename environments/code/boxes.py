"""A reply's process in a box: `Boxes` in the process that owns the sandbox, `boxed` in the worker that judges."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from palaestra.environments.code.forks import Carry
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import Box, BoxLimits, Destroyed, Entry, Executed, Sandbox

LIMITS = BoxLimits(memory=768 << 20, disk=16 << 20, inodes=1000, processes=64, output=16 << 10)
"""A process of the reply has 512 MiB of address space; this much it has with its children."""
FILES, FOLDER, PORT = ("plain.py", "reply.py"), "/opt/reply", 4711
START_SECONDS = 30.0
SECONDS = struct.Struct("<d")
HERE = Path(__file__).parent


class Boxes:
    """The boxes of one judgement, one at a time, each with reply.py in it. Leaving the context destroys the last."""

    def __init__(self, sandbox: Sandbox, image: str) -> None:
        self._sandbox, self._image = sandbox, image
        self._box: Box | None = None
        self._over = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Boxes:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._lock:
            self._over = True
            await self._destroy()

    async def answer(self, payload: bytes) -> bytes:
        """To nothing: nothing, once there is a fresh box. To seconds and a request: what its process answers to that;
        nothing where no answer comes. Raises Failure(SANDBOX) where the machine is at fault."""
        async with self._lock:
            if self._over:
                raise Failure(Cause.CANCELLED, "the judgement is over")
            if not payload:
                await self._renew()
                return b""
            assert self._box is not None
            (seconds,) = SECONDS.unpack_from(payload)
            try:
                return await self._box.ask(PORT, payload[SECONDS.size :], seconds)
            except (OSError, Destroyed):
                return b""

    async def _renew(self) -> None:
        await self._destroy()
        self._box = await self._sandbox.create(self._image, LIMITS)
        done = await self._started(self._box)
        if done.status or done.stopped:
            said = done.output.decode(errors="replace").strip()
            raise Failure(Cause.SANDBOX, f"python3 does not run in the image {self._image}: {said[-300:]}")

    async def _started(self, box: Box) -> Executed:
        """Start reply.py in the background; no reply has had a part in what goes wrong here."""
        try:
            await box.put({f"{FOLDER}/{name}": Entry("file", 0o644, (HERE / name).read_bytes()) for name in FILES})
            return await box.exec(f"python3 -I {FOLDER}/reply.py {PORT}", START_SECONDS)
        except (OSError, Destroyed) as error:
            raise Failure(Cause.SANDBOX, f"a fresh box does not work: {error}") from error

    async def _destroy(self) -> None:
        box, self._box = self._box, None
        if box is not None:
            await box.destroy()


@contextlib.contextmanager
def boxed(ask: Callable[[bytes], bytes]) -> Iterator[Carry]:
    """A fresh process in a fresh box, by asking who owns the sandbox (`Boxes.answer`)."""
    ask(b"")

    def carry(request: bytes, seconds: float) -> bytes:
        answer = ask(SECONDS.pack(seconds) + request)
        if not answer:
            raise EOFError("no answer")
        return answer

    yield carry
