"""Which sandbox: by name, or the strongest that this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from palaestra.environments.sandbox.docker import Docker
from palaestra.environments.sandbox.images import HOST
from palaestra.environments.sandbox.native import Native
from palaestra.environments.sandbox.process import ProcessBackend
from palaestra.environments.sandbox.warm import Warm
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits, Capabilities, Sandbox


class Backend(Sandbox, Protocol):
    """A sandbox that can be ended."""

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """Run one command in a fresh box with our standard input, output and errors; its exit status."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


ASK_SECONDS = 30.0
BACKENDS: dict[str, Callable[[], Backend]] = {"native": Native, "docker": Docker, "process": ProcessBackend}


def lacks_native() -> str:
    """Why the native backend cannot work here; empty where it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt-get install bubblewrap)"
    try:
        with open("/proc/sys/user/max_user_namespaces") as file:
            if int(file.read()) == 0:
                return "user namespaces are forbidden (sysctl user.max_user_namespaces)"
    except OSError:
        return "this is no Linux with user namespaces"
    return ""


def open_backend(name: str = "auto", needs: Capabilities | None = None) -> Backend:
    """The backend of a name; `auto`: native, or docker where native cannot be had. `process`, which isolates nothing,
    is only had by its name.

    Raises UsageError where there is none, and naming what an environment needs that the backend does not give.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"there is no sandbox backend {name!r}; the backends are: auto, {', '.join(BACKENDS)}")
    reason = lacks_native() if name in ("auto", "native") else ""
    if name == "native" and reason:
        raise UsageError(f"sandbox backend native: {reason}; `palaestra sandbox doctor` says more")
    chosen = ("docker" if reason else "native") if name == "auto" else name
    try:
        backend = BACKENDS[chosen]()
    except UsageError as error:
        raise UsageError(f"sandbox backend native: {reason}; {error}") if reason else error from None
    refuse(chosen, backend.capabilities, needs)
    return backend


class BoxConfig(BaseModel):
    """The part of an environment's configuration that says what its boxes are: the `backend` of the sandbox, the
    `image` and `limits` of a box, and how many are made ahead, `warm` (which pays where making one takes long, with
    docker, say)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str = "auto"
    image: str = HOST
    limits: BoxLimits = BoxLimits()
    warm: int = Field(default=0, ge=0)


async def ready_backend(config: BoxConfig, needs: Capabilities, programs: Iterable[str] = ()) -> Backend:
    """The backend, after it has made a box of the image in which all the programs are; with `warm` boxes made ahead.

    Raises UsageError as `open_backend` does, and naming what the image lacks; Failure where no box can be made.
    """
    backend = open_backend(config.backend, needs)
    try:
        box = await backend.create(config.image, config.limits)
        asked = "; ".join(f"command -v {program} > /dev/null || echo {program}" for program in sorted(programs))
        missing = (await box.exec(asked or "true", ASK_SECONDS)).output.decode().split()
        await box.destroy()
        if missing:
            raise UsageError(
                f"image {config.image} of the sandbox lacks {', '.join(missing)}, which this environment's tasks use; "
                "install it there, or choose another image"
            )
    except BaseException:
        await backend.close()
        raise
    return Warm(backend, config.warm) if config.warm else backend


def refuse(name: str, given: Capabilities, needs: Capabilities | None) -> None:
    """Raise UsageError where the backend lacks what is needed."""
    wanted = (needs or Capabilities()).model_dump()
    missing = [capability for capability, need in wanted.items() if need and not getattr(given, capability)]
    if missing:
        raise UsageError(
            f"sandbox backend {name} does not enforce {', '.join(missing)}, which this environment needs; "
            "`palaestra sandbox doctor` says what this machine can do"
        )
