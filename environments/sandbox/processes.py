"""Processes of a box, seen from the host: when they began, which carry a mark, and stopping them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from palaestra.gym.sandbox import Process

TICKS = os.sysconf("SC_CLK_TCK")
PASSES = 50


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


def namespace(pid: int) -> str:
    """The name of a process's process namespace. Raises OSError where it is gone."""
    return os.readlink(f"/proc/{pid}/ns/pid")


def inside(name: str) -> Iterator[int]:
    """The processes in a process namespace, by their numbers here; none for our own."""
    if name == namespace(os.getpid()):
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                if namespace(int(entry)) == name:
                    yield int(entry)


def dead(pid: int, name: str) -> bool:
    """Whether the process of that number and namespace has ended, reaped or not."""
    try:
        return namespace(pid) != name or _dead(pid)
    except OSError:
        return True


def shells(pids: Iterable[int], init: int) -> Iterator[int]:
    """Those of the processes whose standard input is where the box's init has its commands from (shell.SUPERVISOR)."""
    commands = os.readlink(f"/proc/{init}/fd/3")
    for pid in pids:
        with suppress(OSError):
            if pid != init and os.readlink(f"/proc/{pid}/fd/0") == commands:
                yield pid


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


def kill(pids: Iterable[int]) -> None:
    """Kill processes, as far as they are still there."""
    for pid in list(pids):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def stop(find: Callable[[], Iterable[int]], since: float, spared: Iterable[int] = ()) -> None:
    """Kill the processes that `find` finds and that began after `since` (seconds of CLOCK_BOOTTIME), but for those that
    are spared; again, until it finds no more: what is killed may have begun others meanwhile."""
    kept = set(spared)
    for _ in range(PASSES):
        killed = False
        for pid in find():
            with suppress(OSError):
                if pid not in kept and started(pid) >= int(since * TICKS) and not _dead(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed = True
        if not killed:
            return


def _dead(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
