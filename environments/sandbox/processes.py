"""Processes of a box, seen from the host: when they began, which carry a mark, and stopping them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress

from palaestra.gym.sandbox import Process

TICKS = os.sysconf("SC_CLK_TCK")


def started(pid: int) -> int:
    """When a process began, in clock ticks since boot: with its number this names it for good. Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def marked(mark: str) -> Iterator[int]:
    """The processes whose first environment held `mark`, wherever they have moved since."""
    wanted = mark.encode()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    yield int(name)


def beside(init: int) -> Iterator[int]:
    """The processes in the process namespace of `init`, itself included. Raises OSError where it is gone."""
    namespace = os.readlink(f"/proc/{init}/ns/pid")
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    yield int(name)


def described(pids: Iterable[int]) -> list[Process]:
    """The processes, by the numbers that they have in their own namespace."""
    found = []
    for pid in pids:
        with suppress(OSError, IndexError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().rstrip(b"\0").decode(errors="replace").split("\0")
            with open(f"/proc/{pid}/status") as file:
                inside = [line.split()[-1] for line in file if line.startswith("NSpid:")]
            found.append(Process(int(inside[0]), tuple(arguments)))
    return found


def stop(pids: Iterable[int], since: float, spared: Iterable[int] = ()) -> None:
    """Kill the processes that began after `since` (seconds of CLOCK_BOOTTIME), but for those that are spared."""
    kept = set(spared)
    for pid in pids:
        with suppress(OSError):
            if pid not in kept and started(pid) >= since * TICKS - 1:
                os.kill(pid, signal.SIGKILL)
