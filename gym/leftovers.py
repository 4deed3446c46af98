"""What a process still holds: its child processes, threads and file descriptors, read from /proc."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MARK = "PALAESTRA_CHECK"
GRACE = 3.0
"""Seconds that a process or thread on its way out is given."""


@dataclass(frozen=True)
class Holdings:
    """Processes by pid with their command lines, names of threads, and targets of file descriptors."""

    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[int, str] = field(default_factory=dict)
    descriptors: dict[int, str] = field(default_factory=dict)

    def beyond(self, before: Holdings) -> Holdings:
        """What is held now and was not before."""
        return Holdings(
            {pid: name for pid, name in self.processes.items() if pid not in before.processes},
            {ident: name for ident, name in self.threads.items() if ident not in before.threads},
            {fd: name for fd, name in self.descriptors.items() if before.descriptors.get(fd) != name},
        )

    def named(self, episodes: int) -> list[str]:
        """A line for each kind that was left: any process, and threads or descriptors of which there is one an episode
        (fewer are caches that a library opens once)."""
        lines = [f"process {pid} ({name})" for pid, name in list(self.processes.items())[:2]]
        if len(self.threads) >= episodes:
            lines.append(f"{len(self.threads)} threads ({next(iter(self.threads.values()))}, ...)")
        if len(self.descriptors) >= episodes:
            lines.append(f"{len(self.descriptors)} open files ({next(iter(self.descriptors.values()))}, ...)")
        return lines


@contextmanager
def marked() -> Iterator[str]:
    """Mark every process that starts meanwhile through an inherited environment variable, so that those which left
    our process tree are found too; end those that are left."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    gc.collect()
    gc.freeze()  # a large process would go through all that it had before again and again
    try:
        yield mark
    finally:
        gc.unfreeze()
        os.environ.pop(MARK, None)
        for pid in _processes(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def holdings(mark: str) -> Holdings:
    """What this process holds now."""
    gc.collect()
    threads = {thread.ident or 0: thread.name for thread in threading.enumerate() if thread.name != "palaestra-sync"}
    return Holdings(_processes(mark), threads, _descriptors())


async def left_since(before: Holdings, mark: str, episodes: int) -> list[str]:
    """The lines of what is left after a grace."""
    deadline = time.monotonic() + GRACE
    while (lines := holdings(mark).beyond(before).named(episodes)) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return lines


def _processes(mark: str) -> dict[int, str]:
    """Processes that carry the mark or are our children, zombies and the shared worker processes aside."""
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            ours = int(parent) == os.getpid() or f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if ours and state != "Z":
                found[int(folder.name)] = command[:80]
    return found


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(entry.name)] = os.readlink(entry)
    return {fd: name for fd, name in found.items() if not name.startswith("/proc/")}
