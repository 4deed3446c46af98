"""Environments with their resources open: each is opened once in a process, by its first episode."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from palaestra.gym.environment import Environment
from palaestra.gym.registry import EnvironmentSpec, UsageError

OPEN_SECONDS = 1800.0
"""How long an environment's resources may take to open (an index, an image)."""


class Prototypes:
    """For each alias of `specs` an environment whose resources are open; episodes play `fresh()` ones of it."""

    def __init__(self, specs: Mapping[str, EnvironmentSpec]) -> None:
        self._specs = specs
        self._opened: dict[str, Environment] = {}
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def of(self, alias: str) -> Environment:
        """The environment of that alias; who asks while it opens waits. Raises what its `open` raises, and the next one
        who asks tries again."""
        async with self._opening[alias]:
            if alias not in self._opened:
                spec = self._specs[alias]
                kind, config = spec.environment(), spec.settings()
                prototype = kind(config, await self._resources(alias, kind, config))
                prototype.provenance = {"environment_sha256": spec.sha256}
                self._opened[alias] = prototype
            return self._opened[alias]

    async def _resources(self, alias: str, kind: type[Environment], config: Any) -> Any:
        try:
            async with asyncio.timeout(OPEN_SECONDS) as clock:
                return await kind.open(config)
        except TimeoutError:
            if not clock.expired():
                raise
            raise UsageError(f"environment {alias}: open() did not finish within {OPEN_SECONDS:g} s") from None

    async def close(self) -> None:
        """Shut what was opened; the next `of` opens anew."""
        while self._opened:
            _, prototype = self._opened.popitem()
            await type(prototype).shut(prototype.resources)
