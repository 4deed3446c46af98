"""Copies of what tasks ask to repair that lie in an image already, and a backend whose boxes do not see them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from palaestra.environments.sandbox.backends import Backend
from palaestra.environments.swe.repository import whole
from palaestra.gym.sandbox import Box, BoxLimits

SECONDS = 120.0
ALIKE = 0.5
"""The share of a file's lines from which on another one is a copy of it."""
KERNELS = ("/proc", "/sys", "/dev")


async def copies_in(box: Box, packages: Iterable[str]) -> list[str]:
    """The folders (with a / at the end) and files of a fresh box that hold a package's source."""
    originals = {}
    for name in packages:
        repo = whole(name)
        source = max(repo.sources, key=lambda path: len(repo.files[path]))
        originals[source.removeprefix(f"{repo.path}/")] = repo.files[source]
    pruned = " -o ".join(f"-path {folder}" for folder in KERNELS)
    wanted = " -o ".join(f"-path {shlex.quote(f'*/{path}')}" for path in originals)
    found = await box.exec(f"find / \\( {pruned} \\) -prune -o -type f \\( {wanted} \\) -print 2>/dev/null", SECONDS)
    copies = []
    for place in found.output.decode(errors="surrogateescape").splitlines():
        path = next(path for path in originals if place.endswith(f"/{path}"))
        if _alike(originals[path], await box.read(place)):
            above = place.removesuffix(path)
            copies += [f"{above}{path.split('/')[0]}/"] if "/" in path else [place, f"{above}__pycache__/"]
    return copies


class Hiding:
    """A backend whose boxes do not see some paths of their image."""

    def __init__(self, backend: Backend, hidden: Iterable[str]) -> None:
        self._backend = backend
        self._hidden = tuple(hidden)
        self.capabilities = backend.capabilities

    async def create(self, image: str, limits: BoxLimits) -> Box:
        """See Sandbox.create."""
        return await self._backend.create(image, self._hiding(limits))

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """See Backend.run."""
        return await self._backend.run(image, self._hiding(limits), command)

    def _hiding(self, limits: BoxLimits) -> BoxLimits:
        return limits.model_copy(update={"hidden": (*limits.hidden, *self._hidden)})

    async def close(self) -> None:
        """See Backend.close."""
        await self._backend.close()


def _alike(original: bytes, other: bytes) -> bool:
    lines = {line.strip() for line in original.splitlines()} - {b""}
    return len(lines & {line.strip() for line in other.splitlines()}) >= ALIKE * len(lines)
