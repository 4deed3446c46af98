"""What the sandbox tests share: the backends of this machine, and programs that run in a box."""

from __future__ import annotations

import asyncio
import os
import shlex
from contextlib import suppress

from palaestra.environments.sandbox.backends import open_backend
from palaestra.environments.sandbox.base import NAME
from palaestra.environments.sandbox.images import HOST, find
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits, Capabilities

SMALL = BoxLimits(memory=128 << 20, disk=24 << 20, inodes=2000, processes=64, cpus=1.0, output=64 << 10)


async def _opened(name: str) -> Capabilities:
    backend = open_backend(name)
    await backend.close()
    if IMAGES[name] != HOST:
        find(IMAGES[name])
    return backend.capabilities


def _present() -> dict[str, Capabilities]:
    """The isolating backends of this machine, with what they enforce."""
    found = {}
    for name in IMAGES:
        with suppress(UsageError):
            found[name] = asyncio.run(_opened(name))
    return found


IMAGES = {"native": HOST, "docker": NAME}
CAPABILITIES = _present()
if missing := set(os.environ.get("PALAESTRA_TEST_BACKENDS", "").split()) - CAPABILITIES.keys():
    raise RuntimeError(f"PALAESTRA_TEST_BACKENDS wants {', '.join(missing)}; see `palaestra sandbox doctor`")
ISOLATING = list(CAPABILITIES)


def enforcing(capability: str) -> list[str]:
    """The backends that enforce it; docs/sandbox.md says which do not, and when."""
    return [name for name, given in CAPABILITIES.items() if getattr(given, capability)]


def python(code: str) -> str:
    """A shell command that runs Python in the box."""
    return f"python3 -c {shlex.quote(code)}"


def call(number: int, *arguments: str) -> str:
    """A shell command that makes a system call and prints its result and errno."""
    listed = ", ".join(("", *arguments))
    return python(
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
        f"print('result', libc.syscall({number}{listed}), 'errno', ctypes.get_errno())"
    )
