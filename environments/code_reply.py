"""The reply's side of a code judgement: a fork server, run as a program of its own that never sees a test.

For every request it forks a supervisor, which leaves the namespaces that the kernel lets it leave and forks a process
that gives up its user, takes limits on, loads the reply's source and answers calls. Only plain data cross, as tagged
JSON. Whatever the reply starts ends with its supervisor, a new session or group notwithstanding.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

NEW_NAMESPACES = 0x20000000 | 0x08000000 | 0x40000000 | 0x00020000  # pid, ipc, net, mount
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
MS_PRIVATE_ALL = (1 << 18) | (1 << 14)
FIRST_UID = 300_000
LARGEST_MESSAGE = 4 << 20
HEADER = struct.Struct("<I")
SCRATCH = (b"/tmp", b"/var/tmp", b"/dev/shm")

# Loaded before the user is given up: the interpreter's library may lie where another user cannot read.
COMMON = """
    abc array ast base64 bisect calendar cmath collections collections.abc copy dataclasses datetime decimal
    enum fractions functools hashlib heapq inspect io itertools math numbers operator pprint queue random re
    secrets statistics string subprocess sys textwrap threading time traceback types typing unicodedata
    unittest uuid zlib
    """.split()  # noqa: SIM905 (a word list reads better as text)

TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}

_libc = ctypes.CDLL(None, use_errno=True)


# -- plain data as tagged JSON


def encode(value: Any) -> Any:
    """Plain data, or one of its types, as JSON values. Raises TypeError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return {tag: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(item)] for key, item in value.items()]}
    if any(value is kind for kind in TYPES.values()):
        return {"y": value.__name__}
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(value: Any) -> Any:
    """What `encode` encoded. Raises ValueError, TypeError or KeyError for anything else."""
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "d":
        return {decode(key): decode(item) for key, item in content}
    kinds = {"l": list, "t": tuple, "s": set, "z": frozenset}
    if tag in kinds:
        return kinds[tag](decode(item) for item in content)
    if tag == "c":
        return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    readers = {"i": lambda text: int(text, 16), "f": float.fromhex, "b": bytes.fromhex, "y": TYPES.__getitem__}
    return readers[tag](content)


def send(channel: socket.socket, message: Any) -> None:
    """One message. Raises ValueError for too large a one."""
    payload = json.dumps(message).encode()
    if len(payload) > LARGEST_MESSAGE:
        raise ValueError(f"{len(payload)} bytes of data; at most {LARGEST_MESSAGE} may cross")
    channel.sendall(HEADER.pack(len(payload)) + payload)


def receive(channel: socket.socket) -> Any:
    """One message. Raises EOFError at the end, ValueError for nonsense, TimeoutError under the channel's timeout."""
    (size,) = HEADER.unpack(_exactly(channel, HEADER.size))
    if size > LARGEST_MESSAGE:
        raise ValueError("the message is too large")
    return json.loads(_exactly(channel, size))


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise EOFError("the other side closed the channel")
        parts += part
    return bytes(parts)


# -- the child


def _isolate(memory: int, seconds: int, number: int) -> None:
    """Take on limits and give up the user; the namespaces were left before."""
    for name, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (limit, limit))
    if os.getuid() == 0:
        uid = FIRST_UID + number % 60_000
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _leave_namespaces() -> bool:
    """New process, network, IPC and mount namespaces, with private scratch folders. False where the kernel refuses."""
    if _libc.unshare(NEW_NAMESPACES) != 0:
        return False
    _libc.mount(b"none", b"/", None, MS_PRIVATE_ALL, None)
    for folder in SCRATCH:
        _libc.mount(b"tmpfs", folder, b"tmpfs", 0, b"size=4m,nr_inodes=256,mode=1777")
    return True


def _answer(channel: socket.socket, source: str) -> None:
    """Load the reply, then answer calls until the channel closes."""
    space: dict[str, Any] = {"__name__": "reply"}
    try:
        exec(compile(source, "reply", "exec"), space)
        send(channel, {"ready": True})
    except BaseException as error:
        send(channel, {"error": type(error).__name__, "text": str(error)[:500]})
        return
    while True:
        call = receive(channel)
        try:
            arguments, named = decode(call["args"]), decode(call["named"])
            value = encode(space[call["name"]](*arguments, **named))
            send(channel, {"value": value, "args": encode(arguments)})
        except BaseException as error:
            send(channel, {"error": type(error).__name__, "text": str(error)[:500]})


def _child(channel: socket.socket, request: dict[str, Any], number: int) -> None:
    """Supervise a process that answers; at SIGTERM, or when it ends, end it and everything that it started."""
    waited = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.setsid()
    _leave_namespaces()
    if os.fork():
        channel.close()
        signal.sigwait(waited)
        _end_offspring()
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
    os.chdir("/")
    _isolate(request["memory"], request["seconds"], number)
    _answer(channel, request["source"])


def _end_offspring() -> None:
    """Kill the children until there is none: as their subreaper we inherit what they leave behind."""
    with contextlib.suppress(ChildProcessError):
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for child in children.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def serve(control: socket.socket) -> None:
    """Fork a child for every request; a request is a message with the child's channel. Its process id is answered."""
    for name in COMMON:
        importlib.import_module(name)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    number = os.getpid()
    while True:
        size, descriptors, _, _ = socket.recv_fds(control, HEADER.size, 1)
        if not size:
            return
        (length,) = HEADER.unpack(size)
        request = json.loads(_exactly(control, length))
        number += 1
        child = os.fork()
        if not child:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _child(socket.socket(fileno=descriptors[0]), request, number)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.sendall(HEADER.pack(child))
        del request


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
