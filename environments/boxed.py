"""Environments whose policy works in a box: how they are configured, the box's life, its shell as a tool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from palaestra.environments.sandbox.backends import Backend, BoxConfig, ready_backend
from palaestra.gym.environment import Environment, tool
from palaestra.gym.sandbox import Box, Capabilities
from palaestra.gym.types import Task

GRACE = 15.0
"""Seconds beyond a command's own: for the shell to be stopped, and another to begin."""
VISITS = 180.0
"""Seconds for what is collected from one box and put into another."""
NEEDS = Capabilities(isolation=True, no_network=True)


class Boxed(Environment):
    """Gives each episode a fresh box and the tool `bash` in it; rewards look at `self.box`."""

    class Config(BoxConfig):
        """`backend` of the sandbox, `image` and `limits` of its boxes, of which `warm` are made ahead; `seconds` that
        one command may take; `shown`: characters of output that the policy sees."""

        seconds: float = Field(default=30.0, gt=0)
        shown: int = Field(default=8000, ge=100)

    _box: Box | None = None

    @classmethod
    def programs(cls, config: Any) -> Iterable[str]:
        """What the image must have."""
        return ()

    @classmethod
    async def open(cls, config: Any) -> Backend:
        """The sandbox. Raises UsageError where it gives less than is needed, or its image lacks a program."""
        return await ready_backend(config, NEEDS, cls.programs(config))

    @classmethod
    async def shut(cls, resources: Any) -> None:
        """End it, and every box with it."""
        await resources.close()

    def deadlines(self, task: Task) -> Mapping[str, float]:
        """A tool may take as long as a command; a judge too, and what it looks at has to leave the box."""
        return {"tool": self.config.seconds + GRACE, "judge": self.config.seconds + GRACE + VISITS}

    @property
    def box(self) -> Box:
        """The episode's box, from setup on."""
        assert self._box is not None, "setup has made no box; let it await super().setup(task)"
        return self._box

    async def setup(self, task: Task) -> Any:
        """Make the episode's box."""
        self._box = await self.another_box()

    async def another_box(self) -> Box:
        """Another box; who asks for it destroys it."""
        return await self.resources.create(self.config.image, self.config.limits)  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Destroy the episode's box."""
        if self._box is not None:
            await self._box.destroy()
            self._box = None

    @tool
    async def bash(self, command: str) -> str:
        """Run a command in the shell."""
        done = await self.box.exec(command, self.config.seconds)
        text = shown(done.output, self.config.shown)
        if done.stopped:
            return f"{text}\n[stopped: it ran for {self.config.seconds:g} s, or wrote far too much]"
        return text if done.status == 0 else f"{text}\n[exit status {done.status}]"


def shown(output: bytes, limit: int) -> str:
    """Output as text, its middle left out where it is long."""
    text = output.decode(errors="replace").replace("\0", "")
    if len(text) <= limit:
        return text.rstrip("\n")
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - limit} characters left out]\n{text[-half:]}"
