"""Boxes made ahead: a backend whose boxes take long to make has the next ones ready."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from palaestra.gym.sandbox import Box, BoxLimits

if TYPE_CHECKING:
    from palaestra.environments.sandbox.backends import Backend


READY_SECONDS = 5.0


class Warm:
    """A backend with at most `count` boxes ready, of the image and limits that were last asked for."""

    def __init__(self, backend: Backend, count: int) -> None:
        self._backend = backend
        self._count = count
        self.capabilities = backend.capabilities
        self._kind: tuple[str, BoxLimits] | None = None
        self._ready: deque[asyncio.Task[Box]] = deque()

    async def create(self, image: str, limits: BoxLimits) -> Box:
        """See Sandbox.create. A box that could not be made ahead is made now."""
        if self._kind != (image, limits):
            await self._drop()
            self._kind = image, limits
        first = self._ready.popleft() if self._ready else None
        while len(self._ready) < self._count:
            self._ready.append(asyncio.create_task(self._backend.create(image, limits)))
        if first is not None:
            with suppress(Exception):
                box = await first
                if (await box.exec("true", READY_SECONDS)).status == 0:
                    return box
                await box.destroy()
        return await self._backend.create(image, limits)

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """See Backend.run."""
        return await self._backend.run(image, limits, command)

    async def _drop(self) -> None:
        ready, self._ready = list(self._ready), deque()
        for making in ready:
            with suppress(Exception):
                await (await making).destroy()

    async def close(self) -> None:
        """End every box, and the backend."""
        await self._drop()
        await self._backend.close()
