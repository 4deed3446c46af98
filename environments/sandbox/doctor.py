"""What this machine can do for sandboxes: each finding with what it means and how to get the rest."""

from __future__ import annotations

import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from palaestra.environments.sandbox import cgroups, images
from palaestra.environments.sandbox.backends import BACKENDS, open_backend
from palaestra.environments.sandbox.base import NAME
from palaestra.gym.outcome import Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits


class Finding(NamedTuple):
    """What was looked at, whether it is there, and what follows."""

    name: str
    good: bool
    text: str


def _number(path: str) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return 0


def machine() -> Iterator[Finding]:
    """What the native backend is made of."""
    bwrap = shutil.which("bwrap")
    yield Finding("bubblewrap", bool(bwrap), bwrap or "apt-get install bubblewrap (or your distribution's package)")
    spaces = _number("/proc/sys/user/max_user_namespaces")
    yield Finding(
        "user namespaces", spaces > 0, f"{spaces} allowed" if spaces else "sysctl user.max_user_namespaces=10000"
    )
    groups = cgroups.parents()
    missing = [name for name in cgroups.CONTROLLERS if name not in groups]
    need = f"not enforced for this user: {', '.join(missing)}; run as root"
    yield Finding("control groups", not missing, need if missing else ", ".join(groups))
    root = os.geteuid() == 0
    text = "each box has 65,536 ids of its own" if root else "each box has one id, yours: run as root for a range"
    yield Finding("ids", root, text)
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    newer = release >= (5, 19)
    yield Finding("kernel", newer, f"{platform.release()}" + ("" if newer else "; images need 5.19 or newer"))


async def backend(name: str) -> Finding:
    """A box made, used and destroyed."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a backend does not enforce, is said below
            opened = open_backend(name)
        try:
            box = await opened.create(NAME if name == "docker" else images.HOST, BoxLimits())
            done = await box.exec("echo works", 10.0)
            await box.destroy()
        finally:
            await opened.close()
    except (UsageError, Failure, OSError) as error:
        return Finding(f"backend {name}", False, str(error))
    seconds = time.perf_counter() - started
    given = opened.capabilities.model_dump()
    lacking = [capability for capability, there in given.items() if not there]
    text = f"a box in {1000 * seconds:.0f} ms, its backend's start included"
    return Finding(
        f"backend {name}",
        done.output == b"works\n",
        text + (f"; not enforced: {', '.join(lacking)}" if lacking else ""),
    )


async def examine() -> list[Finding]:
    """All of it."""
    findings = list(machine())
    for name in BACKENDS:
        findings.append(await backend(name))
    hint = "" if images.names() else "; `palaestra sandbox image build` makes the base image"
    return [*findings, Finding("images", True, images.summary() + hint)]
