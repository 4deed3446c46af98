"""What crosses between harness and reply: plain data as tagged JSON, in messages; and functions that are called across.

Nothing but the standard library: reply.py imports it by its path.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LARGEST_MESSAGE = (1 << 20) - 64
"""A box's service may answer so much, the header included."""
HEADER = struct.Struct("<I")
TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}

Message = dict[str, Any]


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


# -- messages


def packed(message: Any) -> bytes:
    """A message as it travels. Raises ValueError for too large a one."""
    payload = json.dumps(message).encode()
    if len(payload) > LARGEST_MESSAGE:
        raise ValueError(f"{len(payload)} bytes of data; at most {LARGEST_MESSAGE} may cross")
    return HEADER.pack(len(payload)) + payload


def received(peer: socket.socket, seconds: float | None = None) -> bytes:
    """The next message, as it travels. Raises EOFError at the end, ValueError for too large a one, TimeoutError."""
    deadline = None if seconds is None else time.monotonic() + seconds
    header = _exactly(peer, HEADER.size, deadline)
    (size,) = HEADER.unpack(header)
    if size > LARGEST_MESSAGE:
        raise ValueError("the message is too large")
    return header + _exactly(peer, size, deadline)


def unpacked(message: bytes) -> Any:
    """The message that travelled. Raises ValueError for anything else."""
    return json.loads(message[HEADER.size :])


def _exactly(peer: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
        part = peer.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise EOFError("the other side closed the channel")
        parts += part
    return bytes(parts)


# -- a function of another process


class Raised(Exception):
    """The other process's exception, where it is no built-in one."""


class Broken(BaseException):
    """The other process answered with what is no answer. Not an Exception: no test may take it for the function's."""


class Proxy:
    """Stands for a function of another process: `exchange` carries a call there and its answer back."""

    def __init__(self, exchange: Callable[[Message], Message], name: str) -> None:
        self._exchange, self._name = exchange, name

    def __call__(self, *args: Any, **named: Any) -> Any:
        answer = self._exchange({"do": "call", "name": self._name, "args": encode(args), "named": encode(named)})
        if "error" in answer:
            raise _error(str(answer["error"]), str(answer.get("text", "")))
        try:
            value, after = decode(answer["value"]), decode(answer["args"])
        except Exception as error:
            raise Broken("the answer is no plain data") from error
        _mutate(args, after)
        return value


def _error(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        return Raised(f"{name}: {text}")
    if not issubclass(kind, Exception):
        return Broken(f"{name}: {text}")
    with suppress(TypeError):
        return kind(text)
    return Raised(f"{name}: {text}")


def _mutate(args: tuple[Any, ...], after: Any) -> None:
    """Do to our lists, dictionaries and sets what the other process did to its copies."""
    if not isinstance(after, tuple) or len(after) != len(args):
        return
    for ours, theirs in zip(args, after, strict=True):
        if isinstance(ours, list) and isinstance(theirs, list):
            ours[:] = theirs
        elif isinstance(ours, dict | set) and type(ours) is type(theirs):
            ours.clear()
            ours.update(theirs)
