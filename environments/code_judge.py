"""The harness's side of a code judgement: tests run here, the reply in a process of its own (code_reply.py).

Runs in a worker process. Every process that a reply started is dead when `judge` returns.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from palaestra.environments.code_reply import HEADER, decode, encode, receive, send

MEMORY = 512 << 20
CPU_SECONDS = 5
WALL_SECONDS = 10.0
START_SECONDS = 30.0


class Verdict(NamedTuple):
    """Whether the tests passed, and what stopped them if not."""

    passed: bool
    detail: str


class ReplyFailed(Exception):
    """The reply's process died, lied about its answer's form, or took too long."""


class _Server:
    """The fork server, one a worker process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        script = Path(__file__).with_name("code_reply.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", "")},
            cwd="/",
        )
        theirs.close()
        self._control.settimeout(START_SECONDS)

    def start(self, source: str) -> tuple[int, socket.socket]:
        """A child that loads `source`: its process id and our end of its channel."""
        ours, theirs = socket.socketpair()
        payload = json.dumps({"source": source, "memory": MEMORY, "seconds": CPU_SECONDS}).encode()
        socket.send_fds(self._control, [HEADER.pack(len(payload))], [theirs.fileno()])
        self._control.sendall(payload)
        theirs.close()
        answer = self._control.recv(HEADER.size)
        if len(answer) < HEADER.size:
            raise RuntimeError("the fork server of code judgements died")
        return int(HEADER.unpack(answer)[0]), ours


_server: _Server | None = None


@contextlib.contextmanager
def _reply(source: str) -> Iterator[socket.socket]:
    """A channel to a process that has loaded the reply; the process and all its offspring are killed at the end."""
    global _server
    if _server is None:
        _server = _Server()
    try:
        child, channel = _server.start(source)
    except (OSError, RuntimeError):
        _server = None
        raise
    try:
        yield channel
    finally:
        channel.close()
        _kill(child)


def _kill(child: int) -> None:
    """Have a supervisor end the reply's processes, and wait until it is gone. Raises RuntimeError after 5 s."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the supervisor {child} of a code judgement does not end")
        time.sleep(0.0005)


class _Proxy:
    """Stands for the reply's function in the tests: the call happens in the other process."""

    def __init__(self, channel: socket.socket, name: str, deadline: float) -> None:
        self._channel, self._name, self._deadline = channel, name, deadline

    def __call__(self, *args: Any, **named: Any) -> Any:
        answer = _exchange(
            self._channel, {"name": self._name, "args": encode(args), "named": encode(named)}, self._deadline
        )
        if "error" in answer:
            raise _error(str(answer["error"]), str(answer.get("text", "")))
        try:
            value, after = decode(answer["value"]), decode(answer["args"])
        except Exception as error:
            raise ReplyFailed("the answer is no plain data") from error
        _mutate(args, after)
        return value


def _exchange(channel: socket.socket, message: Any, deadline: float) -> dict[str, Any]:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ReplyFailed(f"the reply took longer than {WALL_SECONDS:g} s")
    channel.settimeout(left)
    try:
        if message is not None:
            send(channel, message)
        answer = receive(channel)
    except TimeoutError as error:
        raise ReplyFailed(f"the reply took longer than {WALL_SECONDS:g} s") from error
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ReplyFailed("the reply's process ended before it answered") from error
    if not isinstance(answer, dict):
        raise ReplyFailed("the answer is no plain data")
    return answer


def _error(name: str, text: str) -> Exception:
    """The exception that the reply raised, where it is a built-in one; else a ReplyFailed."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):
            return kind(text)
    return ReplyFailed(f"{name}: {text}")


def _mutate(args: tuple[Any, ...], after: Any) -> None:
    """Do to our lists, dictionaries and sets what the reply did to its copies."""
    if not isinstance(after, tuple) or len(after) != len(args):
        return
    for ours, theirs in zip(args, after, strict=True):
        if isinstance(ours, list) and isinstance(theirs, list):
            ours[:] = theirs
        elif isinstance(ours, dict | set) and type(ours) is type(theirs):
            ours.clear()
            ours.update(theirs)


def judge(tests: str, entry_point: str, prefix: str, source: str) -> Verdict:
    """Run `tests` (Python source that raises on failure) against the function `entry_point` of a reply's `source`.

    The tests see the names of `prefix`, loaded here, and in place of the function a proxy.
    """
    deadline = time.monotonic() + WALL_SECONDS
    space: dict[str, Any] = {"__name__": "tests"}
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        if prefix:
            with contextlib.suppress(SyntaxError):
                exec(compile(prefix, "prefix", "exec"), space)
        with _reply(source) as channel:
            return _run(lambda: _test(tests, entry_point, space, channel, deadline))


def judge_in_one_process(tests: str, source: str) -> Verdict:
    """Run tests and reply together, in a reply's process: for rows whose tests need the reply's own classes.

    A reply can forge this verdict, so such rows are not trained on.
    """
    with _reply(f"{source}\n\n{tests}\n") as channel:
        return _run(lambda: _loaded(channel, time.monotonic() + WALL_SECONDS))


def _run(test: Callable[[], None]) -> Verdict:
    try:
        test()
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {str(error)[:300]}")
    return Verdict(True, "")


def _loaded(channel: socket.socket, deadline: float) -> None:
    first = _exchange(channel, None, deadline)
    if first.get("ready") is not True:
        raise ReplyFailed(f"{first.get('error')}: {first.get('text')}")


def _test(tests: str, entry_point: str, space: dict[str, Any], channel: socket.socket, deadline: float) -> None:
    _loaded(channel, deadline)
    space[entry_point] = _Proxy(channel, entry_point, deadline)
    exec(compile(tests, "tests", "exec"), space)
