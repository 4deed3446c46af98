"""What our engines have in common: who waits and who is served, the thread that computes, how new weights come in."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from palaestra.gym.types import Generation, Sampling
from palaestra.rollout.engine import WeightSource
from palaestra.rollout.requests import Request

Built = TypeVar("Built")


class LocalEngine(ABC, Generic[Built]):
    """The shared half of an Engine that computes in a thread; the event loop stays free. `context`: tokens a
    conversation may have; `Built`: what weights are made into before they replace those in use."""

    def __init__(self, context: int) -> None:
        self.version = 0
        self._context = context
        self._waiting: list[Request] = []
        self._active: list[Request] = []
        self._prepared: tuple[int, Built] | None = None
        self._committed: deque[tuple[int, Built]] = deque()  # the loop appends, the thread takes
        self._loop: asyncio.Task[None] | None = None
        self._thread = compute_thread()
        self._counts = {"drawn": 0, "prefilled": 0, "steps": 0}
        self._busy = 0.0

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation:
        """See Engine.generate."""
        request = Request.of(ids, sampling, session, self._context)
        self._waiting.append(request)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return await request.result()

    async def cancel(self, session: str) -> None:
        """See Engine.cancel."""
        for request in [*self._waiting, *self._active]:
            if request.session == session and request.finish is None:
                request.finish = "cancelled"

    @abstractmethod
    async def prepare(self, weights: WeightSource, version: int) -> None:
        """See Engine.prepare. Sets `_prepared`."""

    async def commit(self, version: int) -> None:
        """See Engine.commit. Takes effect the next time that `_switch` is called."""
        if self._prepared is None or self._prepared[0] != version:
            ready = None if self._prepared is None else self._prepared[0]
            raise ValueError(f"commit({version}): prepared is {ready}; call prepare(weights, {version}) first")
        self._committed.append(self._prepared)
        self._prepared = None
        if not self._active:
            await self._in_thread(self._switch)

    def stats(self) -> Mapping[str, Any]:
        """See Engine.stats."""
        return {**self._counts, "sessions": 0, "version": self.version, "busy": self._busy}

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _switch(self) -> None:
        """Replace the weights by those committed. Called in the thread, between two steps."""
        while self._committed:
            version, built = self._committed.popleft()
            self._use(built)
            self.version = version

    @abstractmethod
    async def _run(self) -> None:
        """Serve requests until none is left."""

    @abstractmethod
    def _use(self, built: Built) -> None:
        """Replace the weights in use."""


def compute_thread() -> ThreadPoolExecutor:
    """One thread for all of an engine's compute, with the creator's number of torch threads. A fresh thread would start
    with OpenMP's own number, and a matrix product's rounding depends on it."""
    return ThreadPoolExecutor(1, "palaestra-engine", torch.set_num_threads, (torch.get_num_threads(),))
