"""Control groups of boxes, version 1 (a hierarchy for each controller) and version 2 (one for all).

A box's group is `palaestra-PID-STARTED/BOX`, where PID and STARTED name the process that owns it: what a killed owner
left behind is found by that name and removed.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from palaestra.environments.sandbox.processes import started
from palaestra.gym.sandbox import BoxLimits

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("memory", "pids", "cpu")
EVENTS = ("memory.oom_control", "memory.events")
"""Where version 1 or 2 counts what was killed for want of memory."""
PREFIX = "palaestra-"
PERIOD = 100_000
"""Microseconds over which the cpu share is enforced."""
REMOVAL_SECONDS = 5.0
SPARE = 16
"""Groups kept for boxes of the same limits."""


def parents() -> dict[str, Path]:
    """Controller -> the folder in which groups can be made; what this user may not make is absent.

    Version 2 gives a folder's groups no controller while other processes are in it, as in a container's root.
    """
    found: dict[str, Path] = {}
    for controller in CONTROLLERS:
        folder = ROOT / controller
        if (folder / "cgroup.procs").exists() and os.access(folder, os.W_OK):
            found[controller] = folder
    if not found and (ROOT / "cgroup.subtree_control").exists() and os.access(ROOT, os.W_OK):
        _enable(ROOT, set(CONTROLLERS) & set((ROOT / "cgroup.controllers").read_text().split()))
        enabled = (ROOT / "cgroup.subtree_control").read_text().split()
        found = {controller: ROOT for controller in CONTROLLERS if controller in enabled}
    return found


def _enable(folder: Path, controllers: Iterable[str]) -> None:
    """Give a folder's groups the controllers (version 2), those that it can."""
    for name in sorted(controllers):
        with suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(f"+{name}")


def owner_name() -> str:
    """The folder of this process's groups."""
    return f"{PREFIX}{os.getpid()}-{started(os.getpid())}"


class Group:
    """The groups of one box. Creating raises OSError."""

    def __init__(self, name: str, limits: BoxLimits) -> None:
        self.folders: list[Path] = []
        self._events: int | None = None
        made = {controller: parent / owner_name() / name for controller, parent in parents().items()}
        try:
            for folder in dict.fromkeys(made.values()):
                self._make(folder, made)
            for controller, folder in made.items():
                _limit(folder, controller, limits)
            for path in (folder / name for folder in self.folders for name in EVENTS if (folder / name).exists()):
                self._events = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.remove()
            raise

    def _make(self, folder: Path, controllers: Iterable[str]) -> None:
        folder.parent.mkdir(exist_ok=True)
        if (folder.parent / "cgroup.subtree_control").exists():
            _enable(folder.parent, controllers)
        folder.mkdir()
        self.folders.append(folder)

    @property
    def doors(self) -> list[Path]:
        """The files to which a process of one thread writes 0 to enter. Version 1's `tasks` needs none of the locks,
        milliseconds of waiting, that `cgroup.procs` takes to keep a process's threads together."""
        return [folder / ("tasks" if (folder / "tasks").exists() else "cgroup.procs") for folder in self.folders]

    def kills(self) -> int:
        """How many processes of the box the kernel has killed for want of memory."""
        if self._events is None:
            return 0
        try:
            counts = dict(line.split() for line in os.pread(self._events, 4096, 0).decode().splitlines())
        except OSError:  # the group went with its backend
            return 0
        return int(counts.get("oom_kill", 0))

    def empty(self) -> bool:
        """Whether it is there, and nobody is in it."""
        try:
            return not any((folder / "cgroup.procs").read_text() for folder in self.folders)
        except OSError:  # it went with its backend
            return False

    def remove(self) -> None:
        """Kill what is left and remove the folders. Raises OSError where something survives REMOVAL_SECONDS."""
        if self._events is not None:
            os.close(self._events)
            self._events = None
        for folder in self.folders:
            _remove(folder)
        self.folders = []


class Groups:
    """The groups of one backend's boxes. One that a box has left serves another of the same limits: making and removing
    groups takes a tenth of a box's time."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._numbers = itertools.count()
        self._spare: dict[BoxLimits, list[Group]] = defaultdict(list)

    def take(self, limits: BoxLimits) -> Group:
        """A group in which nobody is. Raises OSError."""
        spare = self._spare[limits]
        return spare.pop() if spare else Group(f"{self._prefix}{next(self._numbers)}", limits)

    def give(self, group: Group, limits: BoxLimits) -> None:
        """Take a group back; whoever is still in it is killed. Raises OSError as Group.remove."""
        if len(self._spare[limits]) < SPARE and group.empty():
            self._spare[limits].append(group)
        else:
            group.remove()

    def close(self) -> None:
        """Remove them all, whoever is in them."""
        for group in (group for groups in self._spare.values() for group in groups):
            group.remove()
        self._spare.clear()
        disown(self._prefix)


def _limit(folder: Path, controller: str, limits: BoxLimits) -> None:
    unified = (folder / "cgroup.controllers").exists()
    quota = int(PERIOD * limits.cpus)
    files: dict[str, tuple[tuple[str, object], ...]] = {
        "pids": (("pids.max", limits.processes),),
        "memory": (("memory.max", limits.memory), ("memory.swap.max", 0))
        if unified
        else (("memory.limit_in_bytes", limits.memory), ("memory.memsw.limit_in_bytes", limits.memory)),
        "cpu": (("cpu.max", f"{quota} {PERIOD}"),)
        if unified
        else (("cpu.cfs_period_us", PERIOD), ("cpu.cfs_quota_us", quota)),
    }
    for name, value in files[controller]:
        if (folder / name).exists():  # a kernel without swap accounting has no file for it
            (folder / name).write_text(str(value))


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + REMOVAL_SECONDS
    while folder.exists():
        try:
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            folder.rmdir()
        except FileNotFoundError:  # another process sweeps, too
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def disown(prefix: str) -> None:
    """Remove those of this process's groups whose names begin so, and their folder with the last."""
    for parent in dict.fromkeys(parents().values()):
        folder = parent / owner_name()
        for box in folder.glob(f"{prefix}*/"):
            _remove(box)
        with suppress(OSError):
            folder.rmdir()


def sweep() -> list[Path]:
    """Remove the groups whose owner is gone; returns their folders."""
    removed = []
    for parent in dict.fromkeys(parents().values()):
        for folder in parent.glob(f"{PREFIX}*-*"):
            _, pid, began = folder.name.split("-")
            if lives(int(pid), began):
                continue
            for box in (*folder.glob("*/"), folder):
                _remove(box)
            removed.append(folder)
    return removed


def lives(pid: int, began: str) -> bool:
    """Whether the process that began then still runs."""
    try:
        return str(started(pid)) == began
    except OSError:
        return False
