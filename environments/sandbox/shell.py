"""A persistent shell behind three byte streams: commands in, output out, statuses out. The same for every backend.

In the box, SUPERVISOR keeps a shell alive that reads commands from the first stream, one line each. A command's standard
input is /dev/null and both its outputs go to the second stream; when it ends, the shell writes its nonce and exit status
to the third. So output can hold anything, a background process may keep the output open, and a command that swallows
its input swallows nothing of ours. Statuses are observations, never verdicts: whoever is in the box can write them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from palaestra.gym.sandbox import Executed

SUPERVISOR = (
    "exec 3<&0 4>&1 5>&2 </dev/null >/dev/null 2>&1; shell=sh; command -v bash && shell='bash --noprofile --norc'; "
    "echo ready >&5; "
    'while :; do $shell -s <&3; echo "ended $?" >&5; done'
)
"""Init of a box, for `sh -c`. Where the shell ends it says so and starts another."""

CHUNK, CHUNKS = 1 << 16, 16
"""Bytes of one read, and reads before others have their turn."""
GRACE, RESTART = 0.5, 5.0
"""Seconds in which a stopped command's shell, and a killed shell's successor, must report."""
DYING = 0.01
"""Seconds in which what was killed is gone."""
FLOOD = 16
"""How many times the output that is kept a command may write before it is stopped."""


class Streams:
    """Our ends of the three pipes, non-blocking. Owns the descriptors."""

    def __init__(self, commands: int, output: int, statuses: int) -> None:
        self.commands, self.output, self.statuses = commands, output, statuses
        self.closed = False
        for descriptor in (commands, output, statuses):
            os.set_blocking(descriptor, False)

    def close(self) -> None:
        """Close all three. Idempotent."""
        for descriptor in () if self.closed else (self.commands, self.output, self.statuses):
            os.close(descriptor)
        self.closed = True


class Ended(Exception):
    """The box's init is gone."""


class Output:
    """What is kept of a command's output: its head and its tail, half of `limit` bytes each."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def add(self, part: bytes) -> None:
        """More of it."""
        self.total += len(part)
        room = self._half - len(self._head)
        self._head += part[:room]
        self._tail += part[room:]
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    def content(self) -> bytes:
        """Head and tail, with a line between them that says how much is missing."""
        tail = bytes(self._tail[-self._half :]) if self._half else b""
        missing = self.total - len(self._head) - len(tail)
        middle = f"\n[{missing} bytes left out]\n".encode() if missing else b""
        return bytes(self._head) + middle + tail


class Shell:
    """Runs one command at a time. `kept`: bytes of a command's output that are kept; `stop(since)` kills what began in
    the box after `since` (seconds of CLOCK_BOOTTIME), and with 0 everything but its init; `marks`: whether the streams
    are carried apart, so that a status may overtake output, whose end is then marked too."""

    def __init__(self, streams: Streams, kept: int, stop: Callable[[float], None], marks: bool = False) -> None:
        self._streams = streams
        self._marks = marks
        self._kept = kept
        self._stop = stop
        self._said = b""
        self._lock = asyncio.Lock()

    async def starts(self, seconds: float) -> str:
        """Wait until the box is complete and its init runs; what it says instead, where it does not."""
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        loop.add_reader(self._streams.statuses, event.set)
        try:
            while b"ready\n" not in self._said:
                await asyncio.wait_for(event.wait(), seconds)
                event.clear()
                if not (part := os.read(self._streams.statuses, CHUNK)):
                    break
                self._said += part
        except TimeoutError:
            return f"nothing for {seconds:g} s"
        finally:
            loop.remove_reader(self._streams.statuses)
        said, ready, self._said = self._said.partition(b"ready\n")
        return "" if ready else said.decode(errors="replace").strip() or "its init ended at once"

    async def ends(self) -> int:
        """Wait, however long, until the one command of the box ends; its exit status, 137 where the box was killed."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._streams.statuses, event.set)
        try:
            await event.wait()
            word, _, number = os.read(self._streams.statuses, CHUNK).partition(b" ")
        finally:
            loop.remove_reader(self._streams.statuses)
        return int(number) if word == b"ended" and number.strip().isdigit() else 137

    async def exec(self, command: str, timeout: float) -> Executed:
        """Run a command; one whose time runs out, or that floods, is stopped with all that it started.

        Raises Ended where the box is gone.
        """
        async with self._lock:
            if self._streams.closed:
                raise Ended
            return await _Command(self, command).run(timeout)


class _Command:
    """One command under way."""

    def __init__(self, shell: Shell, command: str) -> None:
        self._shell = shell
        self._streams = shell._streams
        self._nonce = secrets.token_hex(8)
        call = f"{{ eval {shlex.quote(command)}\n}} </dev/null >&4 2>&1 3<&- 4>&- 5>&-"
        mark = f"; echo {self._nonce} >&4" if shell._marks else ""
        self._mark = f"{self._nonce}\n".encode() if shell._marks else b""
        self._last = b""
        self._marked = not shell._marks
        self._line = f"{call}; echo {self._nonce} $? >&5{mark}\n".encode()
        self._output = Output(shell._kept)
        self._flood = FLOOD * shell._kept
        self._event = asyncio.Event()
        self._status: int | None = None
        self._gone = False

    async def run(self, timeout: float) -> Executed:
        loop = asyncio.get_running_loop()
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        loop.add_reader(self._streams.output, self._read_output)
        loop.add_reader(self._streams.statuses, self._read_statuses)
        try:
            self._send()
            stopped = not await self._ends(timeout)
            if stopped:
                await self._be_stopped(began)
            self._read_output()
        finally:
            for descriptor in (self._streams.output, self._streams.statuses):
                loop.remove_reader(descriptor)
            loop.remove_writer(self._streams.commands)
        if self._status is None:
            raise Ended
        return Executed(self._status, self._output.content().replace(self._mark, b""), stopped)

    async def _ends(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        return self._over()

    def _over(self) -> bool:
        return self._gone or (self._status is not None and self._marked)

    async def _be_stopped(self, began: float) -> None:
        """Kill what the command started; if it is the shell itself that is busy, kill that too."""
        self._event.clear()
        self._flood = sys.maxsize
        self._shell._stop(began)
        if not await self._ends(GRACE):
            self._shell._stop(0)
            if not await self._ends(RESTART):
                self._gone = True
        await asyncio.sleep(DYING)  # what it wrote last is its own, not the next command's

    def _send(self) -> None:
        try:
            self._line = self._line[os.write(self._streams.commands, self._line) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._gone = True
            self._event.set()
            return
        loop = asyncio.get_running_loop()
        if self._line:
            loop.add_writer(self._streams.commands, self._send)
        else:
            loop.remove_writer(self._streams.commands)

    def _read_output(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(CHUNKS):
                part = os.read(self._streams.output, CHUNK)
                self._output.add(part)
                self._last = (self._last + part)[-len(part) - len(self._mark) :]
                self._marked = self._marked or self._mark in self._last
        if self._over() or self._output.total > self._flood:
            self._event.set()

    def _read_statuses(self) -> None:
        with suppress(BlockingIOError):
            part = os.read(self._streams.statuses, CHUNK)
            self._gone = not part
            self._shell._said += part
        *lines, self._shell._said = self._shell._said[-CHUNK:].split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word in (self._nonce.encode(), b"ended") and number.isdigit():
                self._status = int(number)
                self._marked = self._marked or word == b"ended"  # a shell that has ended marks nothing
        if self._over():
            self._event.set()
