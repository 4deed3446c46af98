"""Blocking judges in worker processes: `await worker(fn, *args, timeout=5)`.

A worker is a plain subprocess that speaks length-prefixed pickles over a socket pair; it is killed, with its whole
process group, when its deadline passes. `fn` travels by name: it must be a module-level function. In mid-call it may
ask its caller: see `answers`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import importlib.util
import math
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
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from palaestra.gym import threads
from palaestra.gym.outcome import Cause, Failure

START_SECONDS, FREE_SECONDS = 60.0, 600.0
_FOREVER = 1e6
"""Seconds: more than 24 days are no timeout for poll(2)."""
_HEADER = struct.Struct("<Q")

Answers = Callable[[bytes], Awaitable[bytes]]
"""What a caller answers to the question of its worker."""
_Answer = Callable[[bytes, float], bytes]
"""The same for a thread, which waits for it until a moment of the monotonic clock."""


class WorkerDied(Exception):
    """The process ended before it answered."""


class _Unanswered(Exception):
    """The caller's answer is an exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _send(channel: socket.socket, value: object) -> None:
    payload = pickle.dumps(value)
    channel.sendall(_HEADER.pack(len(payload)) + payload)


def _read(channel: socket.socket, size: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if not _readable(channel, deadline):
            raise TimeoutError
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise WorkerDied
        parts += part
    return bytes(parts)


def _readable(channel: socket.socket, deadline: float) -> bool:
    waiting = select.poll()  # select(2) knows no descriptor above 1,023
    waiting.register(channel, select.POLLIN)
    seconds = max(0.0, deadline - time.monotonic())
    return bool(waiting.poll(seconds * 1000 if seconds < _FOREVER else None))


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

    def call(self, job: tuple[Any, ...], timeout: float, answer: _Answer | None) -> tuple[str, Any]:
        """How the job ended (`returned` or `raised`), and with what."""
        deadline = time.monotonic() + timeout
        try:
            _send(self._channel, (*job, answer is not None))
            word, value = _receive(self._channel, deadline)
            while word == "asks" and answer is not None:
                _send(self._channel, answer(value, deadline))
                word, value = _receive(self._channel, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            raise WorkerDied from error
        return word, value

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

    def call(self, job: tuple[Any, ...], timeout: float, answer: _Answer | None) -> tuple[str, Any]:
        worker = self._free.get(timeout=FREE_SECONDS)
        try:
            if worker is None:
                worker = _Worker()
                self._live.add(worker)
            return worker.call(job, timeout, answer)
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


def run(fn: Callable[..., Any], *args: Any, timeout: float, answer: _Answer | None = None) -> Any:
    """The blocking form of `worker`, for threads."""
    name = f"{fn.__module__}.{fn.__qualname__}"
    file = getattr(sys.modules.get(fn.__module__), "__file__", None)
    try:
        word, value = _pool().call((fn.__module__, fn.__qualname__, file, args), timeout, answer)
    except _Unanswered as unanswered:
        raise unanswered.error from None
    except TimeoutError as error:
        raise Failure(Cause.VERIFIER, f"worker {name} did not answer within {timeout:g} s") from error
    except queue.Empty as error:
        raise Failure(Cause.VERIFIER, f"no worker process came free for {name} within {FREE_SECONDS:g} s") from error
    except WorkerDied as error:
        raise Failure(Cause.VERIFIER, f"worker process died in {name}") from error
    if word == "returned":
        return value
    raise value


async def worker(fn: Callable[..., Any], *args: Any, timeout: float, answers: Answers | None = None) -> Any:
    """Run the module-level function `fn` in a worker process and return its result.

    With `answers`, `fn` gets before `args` a function `ask(payload: bytes) -> bytes`: whatever it asks, `answers` is
    awaited for, here, within the same `timeout`. An exception of `answers` ends the call and is raised here.
    Raises whatever `fn` raised; Failure(VERIFIER) when the process dies or does not answer within `timeout` seconds.
    """
    if "." in fn.__qualname__:
        raise TypeError(f"worker: {fn.__qualname__} must be a module-level function; move it to the module")
    answer = None if answers is None else _from_thread(answers, asyncio.get_running_loop())
    return await threads.call(run, fn, *args, timeout=timeout, answer=answer)


def _from_thread(answers: Answers, loop: asyncio.AbstractEventLoop) -> _Answer:
    async def awaited(payload: bytes) -> bytes:
        try:
            return await answers(payload)
        except Exception as error:
            raise _Unanswered(error) from error

    def answer(payload: bytes, deadline: float) -> bytes:
        future = asyncio.run_coroutine_threadsafe(awaited(payload), loop)
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            future.cancel()
            raise

    return answer


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

    def ask(payload: bytes) -> bytes:
        _send(channel, ("asks", payload))
        answer: bytes = _receive(channel, math.inf)
        return answer

    while True:
        try:
            module, name, file, args, asking = _receive(channel, math.inf)
        except (WorkerDied, ConnectionError):
            return
        try:
            fn = getattr(_module(module, file), name)
            _send(channel, ("returned", fn(ask, *args) if asking else fn(*args)))
        except Exception as error:
            _send(channel, ("raised", _portable(error)))
