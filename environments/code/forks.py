"""A reply's process by the fork server: milliseconds each. Used in worker processes.

It is in process, network, IPC and mount namespaces of its own, sees none of our files, and as root it is another user.
Where the kernel refuses those, a process with limits is all that it is: use a sandbox there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from palaestra.environments.code.plain import received
from palaestra.gym.outcome import Cause, Failure

SCRIPT = Path(__file__).with_name("server.py")
UNCONTAINED = (
    "this machine lets an ordinary user make no namespaces: replies to code tasks run as you, with limits and nothing "
    "more. Run as root, allow user namespaces, or choose a sandbox (environments.code.config.backend)"
)
START_SECONDS, END_SECONDS = 30.0, 5.0
NUMBER = struct.Struct("<I")

Carry = Callable[[bytes, float], bytes]
"""Carries a request to a reply's process, and within so many seconds its answer back. Raises OSError, EOFError and
ValueError where none comes, TimeoutError."""


@functools.cache
def contained() -> bool:
    """Whether replies' processes have namespaces of their own on this machine."""
    return (
        subprocess.run([sys.executable, "-I", str(SCRIPT), "try"], timeout=START_SECONDS, check=False).returncode == 0
    )


class _Server:
    """The fork server, one a worker process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", "")},
            cwd="/",
            start_new_session=True,  # Ctrl-C is ours
        )
        theirs.close()
        self._control.settimeout(START_SECONDS)

    def start(self) -> tuple[int, socket.socket]:
        """A process that answers: its supervisor's number, and our end of its channel. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        answer = self._control.recv(NUMBER.size)
        if len(answer) < NUMBER.size:
            raise ConnectionError("it ended")
        return int(NUMBER.unpack(answer)[0]), ours


_server: _Server | None = None


@contextlib.contextmanager
def forked() -> Iterator[Carry]:
    """A fresh process; it and all its offspring are gone at the end. Raises Failure(VERIFIER)."""
    global _server
    try:
        _server = _server or _Server()
        supervisor, channel = _server.start()
    except OSError as error:
        _server = None
        raise Failure(Cause.VERIFIER, f"the fork server of code judgements: {error}") from error

    def carry(request: bytes, seconds: float) -> bytes:
        channel.settimeout(seconds)
        channel.sendall(request)
        return received(channel, seconds)

    try:
        yield carry
    finally:
        channel.close()
        _end(supervisor)


def _end(supervisor: int) -> None:
    """Have a supervisor end its processes, and wait until it is gone. Raises Failure(VERIFIER) after END_SECONDS."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while Path(f"/proc/{supervisor}").exists():
        if time.monotonic() > deadline:
            raise Failure(Cause.VERIFIER, f"the supervisor {supervisor} of a code judgement does not end")
        time.sleep(0.0005)
