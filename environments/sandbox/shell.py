"""A persistent shell behind three byte streams: commands in, output out, statuses out. The same for every backend.

In the box, SUPERVISOR keeps a shell alive that reads commands from the first stream. A command's standard input is
/dev/null and both its outputs go to the second stream; when it ends, the shell writes its nonce and exit status to the
third. So output can hold anything, a background process may keep the output open, and a command that swallows its input
swallows nothing of ours. Statuses are observations, never verdicts: whoever is in the box can write them.
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
    'while :; do echo ready >&5; $shell -s <&3; echo "ended $?" >&5; '
    'line=; until [ "$line" = "go $1" ]; do read -r line <&3 || exit; done; done'
)
"""Init of a box, for `sh -c SUPERVISOR sh TOKEN`. Where the shell ends it says so, passes over what the shell left
unread, and starts another when it is told to."""

CHUNK, CHUNKS = 1 << 16, 16
"""Bytes of one read, and reads before others have their turn."""
GRACE, RESTART, DYING = 0.5, 5.0, 0.01
"""Seconds in which a stopped command's shell, and a killed shell's successor, must report; until the killed is gone."""
FLOOD = 16
"""How many times the output that is kept a command may write before it is stopped."""
STATUSES = 1 << 16
"""Bytes of statuses that one command may bring about."""


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


class Pipes:
    """The three pipes of a box: our ends, and the box's (commands, output, statuses)."""

    def __init__(self) -> None:
        commands, output, statuses = os.pipe(), os.pipe(), os.pipe()
        self.theirs = (commands[0], output[1], statuses[1])
        self.streams = Streams(commands[1], output[0], statuses[0])

    def close_theirs(self) -> None:
        """Close the box's ends here: it has its own."""
        for descriptor in self.theirs:
            os.close(descriptor)

    def said(self) -> str:
        """What was written to the statuses: bubblewrap's complaint, where it had one."""
        with suppress(OSError):
            return "; " + os.read(self.streams.statuses, 4096).decode(errors="replace").strip()
        return ""


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
    the box after `since` (seconds of CLOCK_BOOTTIME), and with 0 everything but its init; `token`: what SUPERVISOR was
    given; `marks`: whether the streams are carried apart, so that a status may overtake output, whose end is then
    marked too."""

    def __init__(
        self, streams: Streams, kept: int, stop: Callable[[float], None], token: str, marks: bool = False
    ) -> None:
        self.streams = streams
        self.kept = kept
        self.stop = stop
        self.marks = marks
        self._strayed = False
        """Whether the shell ended, or was left with a command under way: the next command waits for a new one."""
        self._token = token
        self._current: _Exchange | None = None
        self._lock = asyncio.Lock()

    async def starts(self, seconds: float) -> str:
        """Wait until the box is complete and its init runs; what it says instead, where it does not."""
        with _Exchange(self, b"ready") as first:
            await first.over(seconds)
        if first.status is not None:
            return ""
        return first.said.decode(errors="replace").strip() or f"nothing for {seconds:g} s"

    async def ends(self) -> int:
        """Wait, however long, until the one command of the box ends; its exit status, 137 where the box was killed."""
        with _Exchange(self, b"ended") as last:
            await last.over(None)
        return 137 if last.status is None else last.status

    async def exec(self, command: str, timeout: float) -> Executed:
        """Run a command; one whose time runs out, or that floods, is stopped with all that it started.

        Raises Ended where the box is gone.
        """
        async with self._lock:
            if self._strayed:
                await self._find_back()
            return await self._run(command, timeout)

    async def renew(self, kill: Callable[[], None]) -> None:
        """Have the next command wait for another shell than the one that `kill` ends."""
        async with self._lock:
            kill()
            self._strayed = True

    async def close(self) -> None:
        """Give up the command under way, and close the streams."""
        if self._current is not None:
            self._current.give_up()
        async with self._lock:
            self.streams.close()

    async def _find_back(self) -> None:
        """Have a fresh shell, past whatever an earlier one left unread or unsaid. Raises Ended."""
        for seconds in (GRACE, RESTART):
            with _Exchange(self, b"ready") as again:
                again.send(f"\ngo {self._token}\n".encode())
                await again.over(seconds)
            if again.status is not None and not again.ended:
                self._strayed = False
                return
            self.stop(0)  # a shell that still lives has taken the words for a command
        raise Ended

    async def _run(self, command: str, timeout: float) -> Executed:
        nonce = secrets.token_hex(8)
        call = f"{{ eval {shlex.quote(command)}\n}} </dev/null >&4 2>&1 3<&- 4>&- 5>&-"
        mark = f"; echo {nonce} >&4" if self.marks else ""
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        with _Exchange(self, nonce.encode(), f"{nonce}\n".encode() if self.marks else b"") as current:
            self._current = current
            try:
                current.send(f"{call}; echo {nonce} $? >&5{mark}\n".encode())
                stopped = not await current.over(timeout)
                if stopped or current.ended:
                    await self._stop(current, began)
                current.read_output()
            except BaseException:
                self._strayed = True
                self.stop(0)
                raise
            finally:
                self._current = None
        self._strayed = self._strayed or current.ended
        if current.status is None:
            raise Ended
        return Executed(current.status, current.output.content().replace(current.mark, b""), stopped)

    async def _stop(self, current: _Exchange, began: float) -> None:
        """Kill what a command started; if it is the shell itself that is busy, kill that too."""
        current.flood = sys.maxsize
        self.stop(began)
        if not current.ended and not await current.over(GRACE):
            self.stop(0)
            await current.over(RESTART)
        await asyncio.sleep(DYING)  # what it wrote last is its own, not the next command's


class _Exchange:
    """What comes back from the box until the word that ends it, or the shell's end.

    `status`: the number after the word (0 where there is none), None while it has not come; `ended`: whether the shell
    ended instead, with that status; `gone`: whether the box is gone; `said`: the statuses as they came.
    """

    def __init__(self, shell: Shell, word: bytes, mark: bytes = b"") -> None:
        self._streams = shell.streams
        self._word = word
        self.mark = mark
        self._marked = not mark
        self._last = b""
        self.output = Output(shell.kept)
        self.flood = FLOOD * shell.kept
        self.said = b""
        self._line = b""
        self._event = asyncio.Event()
        self.status: int | None = None
        self.ended = False
        self.gone = shell.streams.closed

    def __enter__(self) -> _Exchange:
        if not self.gone:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._streams.output, self.read_output)
            loop.add_reader(self._streams.statuses, self._read_statuses)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._streams.closed:
            loop = asyncio.get_running_loop()
            for descriptor in (self._streams.output, self._streams.statuses):
                loop.remove_reader(descriptor)
            loop.remove_writer(self._streams.commands)

    async def over(self, seconds: float | None) -> bool:
        """Wait until it is over, `seconds` have gone by, or there is too much of it; whether it is over."""
        if not self._finished():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._event.wait()
            self._event.clear()
        return self._finished()

    def give_up(self) -> None:
        """Nobody waits any longer."""
        self.gone = True
        self._event.set()

    def send(self, line: bytes) -> None:
        """Write a line, as fast as it is taken."""
        self._line = line
        if not self.gone:
            self._send()

    def _send(self) -> None:
        try:
            self._line = self._line[os.write(self._streams.commands, self._line) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.give_up()
            return
        loop = asyncio.get_running_loop()
        if self._line:
            loop.add_writer(self._streams.commands, self._send)
        else:
            loop.remove_writer(self._streams.commands)

    def _finished(self) -> bool:
        return self.gone or (self.status is not None and self._marked)

    def read_output(self) -> None:
        """Take what there is."""
        if self.gone and self._streams.closed:
            return
        with suppress(BlockingIOError):
            for _ in range(CHUNKS):
                part = os.read(self._streams.output, CHUNK)
                self.output.add(part)
                self._last = (self._last + part)[-len(part) - len(self.mark) :]
                self._marked = self._marked or self.mark in self._last
                if not part:
                    asyncio.get_running_loop().remove_reader(self._streams.output)  # closed for good
                    break
        if self._finished() or self.output.total > self.flood:
            self._event.set()

    def _read_statuses(self) -> None:
        with suppress(BlockingIOError):
            part = os.read(self._streams.statuses, CHUNK)
            self.gone = not part
            self.said += part
        for line in self.said.split(b"\n")[:-1]:
            self._hear(*line.partition(b" ")[::2])
        if len(self.said) > STATUSES:
            self.said = b""
            self.output.total = max(self.output.total, self.flood + 1)  # a flood, if of another kind
        if self._finished() or self.output.total > self.flood:
            self._event.set()

    def _hear(self, word: bytes, number: bytes) -> None:
        """A line of statuses: the first that counts, counts."""
        if self._word == b"ready" and self.status is not None:
            self.ended = self.ended or word == b"ended"  # a shell that cannot be, its program removed, say
        if self.status is not None or not (number.isdigit() or not number) or len(number) > 3:
            return
        if word == self._word:
            self.status = int(number or 0)
        elif word == b"ended" and self._word != b"ready":
            self.status, self.ended, self._marked = int(number or 0), True, True
