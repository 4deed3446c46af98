"""What runs where a reply runs: it takes requests about the reply's source, strictly one after the other.

Nothing but the standard library, and plain.py beside it: server.py imports it by its path, and a box runs it as a
program of its own, `python3 -I reply.py PORT`, that is asked at a port of the box's loopback.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, Protocol

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)  # alone, by its path, there is no package
from plain import Message, Proxy, decode, encode, packed, received, unpacked  # noqa: E402

sys.path.remove(HERE)

MEMORY = 512 << 20
CPU_SECONDS = 5
LARGEST_FILE = 1 << 20


class Channel(Protocol):
    """Where requests come from and answers go."""

    def receive(self) -> Message:
        """The next request. Raises EOFError when there will be none."""
        ...

    def send(self, answer: Message) -> None:
        """Answer it."""
        ...


class Pair:
    """Requests and answers over one connected socket."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def receive(self) -> Message:
        """See Channel."""
        return unpacked(received(self._peer))

    def send(self, answer: Message) -> None:
        """See Channel."""
        self._peer.sendall(packed(answer))


class Service:
    """Each request is a connection to a port of the loopback, which the answer ends."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._peer: socket.socket | None = None

    def receive(self) -> Message:
        """See Channel."""
        self._peer, _ = self._listener.accept()
        return unpacked(received(self._peer))

    def send(self, answer: Message) -> None:
        """See Channel."""
        assert self._peer is not None
        with self._peer as peer:
            peer.sendall(packed(answer))
            peer.shutdown(socket.SHUT_WR)  # a child of the reply may hold the connection too


# -- requests


def serve(channel: Channel) -> None:
    """Answer requests until the channel closes."""
    module = types.ModuleType("reply")
    sys.modules["reply"] = module
    while True:
        request = channel.receive()
        try:
            answer = REQUESTS[request["do"]](request, module.__dict__, channel)
        except BaseException as error:
            answer = {"error": type(error).__name__, "text": str(error)[:500]}
        channel.send(answer)


def _load(request: Message, space: dict[str, Any], channel: Channel) -> Message:
    """Execute the source."""
    exec(compile(request["source"], "reply", "exec"), space)
    return {"ready": True}


def _call(request: Message, space: dict[str, Any], channel: Channel) -> Message:
    """Call a function of the source; its value, and what it made of its arguments."""
    arguments, named = decode(request["args"]), decode(request["named"])
    value = encode(space[request["name"]](*arguments, **named))
    return {"value": value, "args": encode(arguments)}


def _test(request: Message, space: dict[str, Any], channel: Channel) -> Message:
    """Execute the source, and each of its functions test..., against a function that the asking side has: a call is
    the answer, and the next request its value."""

    def exchange(call: Message) -> Message:
        channel.send(call)
        return channel.receive()

    space[request["name"]] = Proxy(exchange, request["name"])
    exec(compile(request["source"], "reply", "exec"), space)
    for name, value in list(space.items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
    return {"passed": True}


def _run(request: Message, space: dict[str, Any], channel: Channel) -> Message:
    """Run the source as a program with a standard input; its exit status and standard output."""
    given, printed = os.memfd_create("stdin"), os.memfd_create("stdout")
    os.write(given, request["stdin"].encode())
    os.lseek(given, 0, os.SEEK_SET)
    child = os.fork()
    if not child:
        _be_program(request["source"], given, printed)
    _, status = os.waitpid(child, 0)
    stdout = os.pread(printed, LARGEST_FILE, 0).decode(errors="replace")
    return {"status": os.waitstatus_to_exitcode(status), "stdout": stdout}


def _be_program(source: str, given: int, printed: int) -> None:
    """Be the program, to the end of this process."""
    status: Any = 1
    try:
        os.dup2(given, 0)
        os.dup2(printed, 1)
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.argv = ["program.py"]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        status = _status_of(source, main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(status & 0xFF)


def _status_of(source: str, space: dict[str, Any]) -> int:
    try:
        exec(compile(source, "program.py", "exec"), space)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        return 1
    return 0


REQUESTS: dict[str, Callable[[Message, dict[str, Any], Channel], Message]] = {
    "load": _load,
    "call": _call,
    "test": _test,
    "run": _run,
}


def limit() -> None:
    """Take on the limits of a reply's process."""
    for name, ceiling in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (ceiling, ceiling))


def main(port: int) -> None:
    """Listen at a port of the loopback, and go on in the background from there."""
    service = Service(port)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    limit()
    serve(service)


if __name__ == "__main__":
    main(int(sys.argv[1]))
