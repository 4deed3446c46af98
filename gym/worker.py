"""Blocking judges in worker processes: `await worker(fn, *args, timeout=5)`.

A worker is a plain subprocess that speaks length-prefixed pickles over a socket pair; it is killed, with its whole
process group, when its deadline passes. `fn` travels by name: it must be a module-level function.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import pickle
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from palaestra.gym import threads
from palaestra.gym.outcome import Cause, Failure

START_SECONDS = 60.0
_HEADER = struct.Struct("<Q")


class WorkerDied(Exception):
    """The process ended before it answered."""


def _send(channel: socket.socket, value: object) -> None:
    payload = pickle.dumps(value)
    channel.sendall(_HEADER.pack(len(payload)) + payload)


def _read(channel: socket.socket, size: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        ready, _, _ = select.select([channel], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise WorkerDied
        parts += part
    return bytes(parts)


def _receive(channel: socket.socket, deadline: float) -> Any:
    (size,) = _HEADER.unpack(_read(channel, _HEADER.size, deadline))
    return pickle.loads(_read(channel, size, deadline))


class _Worker:
    """One worker process and our end of its channel."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        code = f"from palaestra.gym.worker import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        try:
            _receive(self._channel, time.monotonic() + START_SECONDS)
        except (WorkerDied, TimeoutError) as error:
            self.kill()
            raise WorkerDied from error

    def call(self, job: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        try:
            _send(self._channel, job)
        except OSError as error:
            raise WorkerDied from error
        answer: tuple[bool, Any] = _receive(self._channel, time.monotonic() + timeout)
        return answer

    def kill(self) -> None:
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Workers:
    """A bounded set of workers; each is started when first needed."""

    def __init__(self, size: int) -> None:
        self._free: queue.Queue[_Worker | None] = queue.Queue()
        self._live: set[_Worker] = set()
        for _ in range(size):
            self._free.put(None)

    def call(self, job: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        worker = self._free.get(timeout=max(timeout, 1.0) * 100)
        try:
            if worker is None:
                worker = _Worker()
                self._live.add(worker)
            return worker.call(job, timeout)
        except BaseException:
            if worker is not None:
                self._live.discard(worker)
                worker.kill()
                worker = None
            raise
        finally:
            self._free.put(worker)

    def shut(self) -> None:
        for worker in list(self._live):
            worker.kill()
        self._live.clear()


_workers: _Workers | None = None
_lock = threading.Lock()


def _pool() -> _Workers:
    global _workers
    with _lock:
        if _workers is None:
            _workers = _Workers(max(1, os.cpu_count() or 1))
            atexit.register(shut)
        return _workers


def shut() -> None:
    """Kill all worker processes. Runs at exit; the next call of `worker` starts new ones."""
    global _workers
    with _lock:
        if _workers is not None:
            _workers.shut()
            _workers = None


def run(fn: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """The blocking form of `worker`, for threads."""
    name = f"{fn.__module__}.{fn.__qualname__}"
    file = getattr(sys.modules.get(fn.__module__), "__file__", None)
    try:
        good, value = _pool().call((fn.__module__, fn.__qualname__, file, args), timeout)
    except TimeoutError as error:
        raise Failure(Cause.VERIFIER, f"worker {name} did not answer within {timeout:g} s") from error
    except (WorkerDied, queue.Empty) as error:
        raise Failure(Cause.VERIFIER, f"worker process died in {name}") from error
    if good:
        return value
    raise value


async def worker(fn: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """Run the module-level function `fn` in a worker process and return its result.

    Raises whatever `fn` raised; Failure(VERIFIER) when the process dies or does not answer within `timeout` seconds.
    """
    if "." in fn.__qualname__:
        raise TypeError(f"worker: {fn.__qualname__} must be a module-level function; move it to the module")
    return await threads.call(run, fn, *args, timeout=timeout)


def _module(name: str, file: str | None) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    if file is None or importlib.util.find_spec(name.partition(".")[0]) is not None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def serve(descriptor: int) -> None:
    """The worker's side: answer calls until the channel closes."""
    channel = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    _send(channel, "ready")
    while True:
        try:
            module, name, file, args = _receive(channel, time.monotonic() + 1e9)
        except (WorkerDied, ConnectionError):
            return
        try:
            _send(channel, (True, getattr(_module(module, file), name)(*args)))
        except Exception as error:
            _send(channel, (False, _portable(error)))
