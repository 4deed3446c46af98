"""Run blocking functions beside the event loop, in a bounded pool of daemon threads.

asyncio's own executor is joined when the loop closes, so that one hung tool would hang the process. Here a call that
its caller gave up on is abandoned: its thread is replaced, and never waited for.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

POOL_SIZE = 32


class _Job(NamedTuple):
    future: Future[Any]
    run: Callable[[], Any]


class _Pool:
    def __init__(self, size: int) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._size = size
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, run: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put(_Job(future, run))
        with self._lock:
            if self._idle < self._jobs.qsize() and self._threads < self._size:
                self._start()
        return future

    def abandon(self, future: Future[Any]) -> None:
        """Give up on a call. If it is already running, another thread takes its thread's place."""
        if not future.cancel() and not future.done():
            with self._lock:
                self._size += 1
            future.add_done_callback(lambda _: self._shrink())

    def _shrink(self) -> None:
        with self._lock:
            self._size -= 1

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="palaestra-sync", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._threads > self._size:
                    self._threads -= 1
                    return
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(job.run())
                except BaseException as error:
                    job.future.set_exception(error)


_pool = _Pool(POOL_SIZE)


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`, sync or async, and return its result. A sync one runs in the thread pool."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    context = contextvars.copy_context()
    future = _pool.submit(lambda: context.run(function, *args, **kwargs))
    try:
        result = await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        _pool.abandon(future)
        raise
    return await result if inspect.isawaitable(result) else result
