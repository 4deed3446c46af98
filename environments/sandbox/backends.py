"""Which sandbox: by name, or the strongest that this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from palaestra.environments.sandbox.docker import Docker
from palaestra.environments.sandbox.native import Native
from palaestra.environments.sandbox.process import ProcessBackend
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
    """The backend of a name; `auto`: native. `process`, which isolates nothing, is only had by its name.

    Raises UsageError where there is none, and naming what an environment needs that the backend does not give.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"there is no sandbox backend {name!r}; the backends are: auto, {', '.join(BACKENDS)}")
    chosen = "native" if name == "auto" else name
    if chosen == "native" and (reason := lacks_native()):
        raise UsageError(f"sandbox backend native: {reason}; `palaestra sandbox doctor` says more")
    backend = BACKENDS[chosen]()
    refuse(chosen, backend.capabilities, needs)
    return backend


class Boxes(Protocol):
    """The part of an environment's configuration that its boxes are made by."""

    @property
    def backend(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def limits(self) -> BoxLimits: ...


async def ready_backend(config: Boxes, needs: Capabilities, programs: Iterable[str] = ()) -> Backend:
    """The backend, after it has made a box of the image in which all the programs are.

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
    return backend


def refuse(name: str, given: Capabilities, needs: Capabilities | None) -> None:
    """Raise UsageError where the backend lacks what is needed."""
    wanted = (needs or Capabilities()).model_dump()
    missing = [capability for capability, need in wanted.items() if need and not getattr(given, capability)]
    if missing:
        raise UsageError(
            f"sandbox backend {name} does not enforce {', '.join(missing)}, which this environment needs; "
            "`palaestra sandbox doctor` says what this machine can do"
        )
