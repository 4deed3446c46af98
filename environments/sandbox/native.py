"""The native backend: user namespace, overlay root on a sized tmpfs, bubblewrap, seccomp, cgroups, no network."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox import archives, images, launching
from palaestra.environments.sandbox.cgroups import Group, Groups, parents, sweep
from palaestra.environments.sandbox.images import HOST, Config, Image
from palaestra.environments.sandbox.launching import Launching
from palaestra.environments.sandbox.shell import SUPERVISOR, Pipes, Streams
from palaestra.environments.sandbox.visitor import CLONE_NEWNS, CLONE_NEWUSER
from palaestra.environments.sandbox.visits import (
    COLLECTED,
    ENVIRONMENT,
    FILES,
    KEPT_CAPABILITIES,
    SHM,
    VisitedBox,
    silence,
)
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import BoxLimits, Capabilities, Destroyed, Entry, Executed

RANGE, FIRST, SLOTS = 1 << 16, 0x71000000, 4096
"""Ids of one box; where the boxes' ids begin on the host; how many boxes have ids of their own at once."""
NUMBERS = itertools.count(secrets.randbelow(SLOTS))
"""Of this process's boxes, whatever their backend; begun anywhere, so that other processes seldom use the same ids."""
NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
HOST_LINKS = ("bin", "sbin", "lib", "lib64", "lib32")
HOST_ETC = ("alternatives", "ld.so.cache", "passwd", "group")
HOST_HIDDEN = [
    f"{folder}/"
    for library in ("usr/lib", "usr/lib64", "usr/local/lib", "usr/local/lib64")
    for kind in ("dist-packages", "site-packages")
    for folder in Path("/", library).glob(f"python3*/{kind}")
    if not Path("/", library).is_symlink() and folder.is_dir()
]
"""Of Python a box has the standard library: what else is installed differs from machine to machine, and may be what a
task asks to write."""
STARVED_SECONDS = 10.0
"""For how long the end of a box is put down to its want of memory."""
KILLED = (128 + signal.SIGKILL, -signal.SIGKILL)
"""Statuses of an init, or of bubblewrap above it, that SIGKILL ended: only this machine can send them that."""
MASKED = [
    part for name in ("cmdline", "1/mem", "1/task/1/mem") for part in ("--ro-bind-try", "/dev/null", f"/proc/{name}")
]
"""Files of /proc that tell of the machine, or by which a box could write its own init."""
HOST_IMAGE = Image(Path("/"), Config(workdir="/work"))
ONCE = 'read -r go <&4; "$@" 3>&- 4<&-; echo "ended $?" >&3'
"""Runs one command, once it is told to on 4, and tells on 3 how it ended."""
RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": FILES}


class NativeBox(VisitedBox):
    """A live box."""

    def __init__(
        self,
        launcher: Launching,
        image: Image,
        answer: Mapping[str, Any],
        group: Group,
        give: Callable[[], None],
        streams: Streams,
        limits: BoxLimits,
        token: str,
    ) -> None:
        self._number: int = answer["monitor"]
        self._monitor = os.pidfd_open(self._number)
        try:
            super().__init__(launcher, answer["pid"], streams, limits, token)
        except OSError:
            os.close(self._monitor)
            raise
        self._image = image
        self._group, self._give = group, give
        self._kills, self._starved = group.kills(), -math.inf
        """How many processes the kernel has killed for want of memory, and when that was last seen to rise."""
        self.baseline: Mapping[str, Entry | None] = {}

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        self._look_at_memory()
        return await super().exec(command, timeout)

    def _look_at_memory(self) -> None:
        kills = self._group.kills()
        if kills > self._kills:
            self._kills, self._starved = kills, time.monotonic()

    async def _lost(self) -> Exception:
        """From inside its init cannot be killed, only starved or broken: its own doing."""
        if self._destroyed:
            return Failure(Cause.SANDBOX, "native: the box has been destroyed")
        if not self._launching.lives:
            return Failure(Cause.SANDBOX, "native: the launcher ended, and every box with it")
        if await self._stays():
            return Destroyed("the box has no shell any more")
        status = await self._launching.status(self._number)
        self._look_at_memory()
        if time.monotonic() - self._starved < STARVED_SECONDS:
            return Destroyed("the box ran out of memory and was ended")
        if status is None or status in KILLED:
            return Failure(Cause.SANDBOX, f"native: the box was killed from outside (status {status})")
        return Destroyed(f"the box's first process was brought to its end (status {status})")

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff."""
        return archives.beyond(self.baseline, await self.layer())

    async def layer(self) -> Mapping[str, Entry | None]:
        """The whole writable layer, the baseline included."""
        request = {
            "visit": "diff",
            "limit": COLLECTED,
            "layer": f"{self._launching.stage}/upper",
            "enter": CLONE_NEWUSER | CLONE_NEWNS,
        }
        packed = await self._visited(request, self._monitor)
        lowers = () if self._image is HOST_IMAGE else (self._image.root,)
        return await asyncio.to_thread(archives.changes, packed, lowers)

    def _gone(self) -> bool:
        return super()._gone() or not self._launching.lives

    async def destroy(self) -> None:
        """See Box.destroy."""
        if self._destroyed:
            return
        self._destroyed = True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        try:
            await self.shell.close()
            await _gone(self._handle)
            await _gone(self._monitor)  # it, too, is in the control groups
        finally:
            self._give()
            self._launching.forget(self._number)
            os.close(self._handle)
            os.close(self._monitor)


async def _gone(handle: int) -> None:
    """Wait until a process has ended; the kernel lets a namespace's init end when all in it have. Raises Failure."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), launching.SECONDS)
    except TimeoutError:
        raise Failure(Cause.SANDBOX, f"native: a killed box still lives after {launching.SECONDS:g} s") from None
    finally:
        loop.remove_reader(handle)


class Native:
    """The backend. What needs control groups is enforced where this user may make them."""

    def __init__(self) -> None:
        groups = parents()
        self.capabilities = Capabilities(
            isolation=True, memory="memory" in groups, disk_quota=True, processes="pids" in groups, no_network=True
        )
        self._launching = Launching("native")
        self._groups = Groups(f"boxes-{id(self):x}-")
        self._skeleton: Mapping[str, Entry | None] = {}
        sweep()
        launching.sweep()

    async def create(self, image: str, limits: BoxLimits) -> NativeBox:
        """See Sandbox.create."""
        return await self.of(HOST_IMAGE if image == HOST else images.find(image), limits)

    async def of(self, image: Image, limits: BoxLimits) -> NativeBox:
        """A fresh box of an image at hand."""
        token = secrets.token_hex(8)
        pipes = Pipes()
        command = ["/bin/sh", "-c", SUPERVISOR, "sh", token]
        box = await self._start(image, limits, command, pipes, pipes.theirs, token)
        try:
            if problem := await box.shell.starts(launching.SECONDS):
                raise Failure(Cause.SANDBOX, f"native: the box does not start: {problem}")
            if not limits.loopback:
                await silence(self._launching, box.init, CLONE_NEWUSER)
            if image is HOST_IMAGE:
                self._skeleton = self._skeleton or await box.layer()
                box.baseline = self._skeleton
        except BaseException:
            await box.destroy()
            raise
        return box

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """Run one command in a fresh box with our standard input, output and errors; its exit status."""
        script = ["/bin/sh", "-c", ONCE, "sh", *command]
        pipes = Pipes()
        found = HOST_IMAGE if image == HOST else images.find(image)
        box = await self._start(found, limits, script, pipes, (0, 1, 2, pipes.theirs[2], pipes.theirs[0]))
        try:
            if not limits.loopback:
                await silence(self._launching, box.init, CLONE_NEWUSER)
            os.write(pipes.streams.commands, b"go\n")
            return await box.shell.ends()
        finally:
            await box.destroy()

    async def _start(
        self,
        image: Image,
        limits: BoxLimits,
        command: Sequence[str],
        pipes: Pipes,
        descriptors: Sequence[int],
        token: str = "",
    ) -> NativeBox:
        slot, group = next(NUMBERS), None
        try:
            group = self._groups.take(limits)
            answer = await self._launching.launch(self._request(image, limits, group, slot, command), descriptors)
            return NativeBox(
                self._launching, image, answer, group, partial(self._groups.give, group, limits), pipes.streams, limits,
                token,
            )  # fmt: skip
        except BaseException as error:
            said = pipes.said()
            pipes.streams.close()
            if group is not None:
                group.remove()
            if isinstance(error, Failure | OSError):
                text = error.detail if isinstance(error, Failure) else f"native: {error}"
                limits_told = f" (its limits: {limits.memory} bytes of memory, {limits.processes} processes)"
                raise Failure(Cause.SANDBOX, text + (said if said not in text else "") + limits_told) from error
            raise
        finally:
            pipes.close_theirs()

    def _request(
        self, image: Image, limits: BoxLimits, group: Group, slot: int, command: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "image": "" if image is HOST_IMAGE else str(image.root),
            "base": FIRST + RANGE * (slot % SLOTS) if os.geteuid() == 0 else None,
            "disk": limits.disk,
            "inodes": limits.inodes,
            "groups": [str(path) for path in group.doors],
            "rlimits": RLIMITS,
            "namespaces": NAMESPACES,
            "arguments": self._arguments(image, limits.hidden),
            "command": list(command),
            "environment": {**ENVIRONMENT, **image.config.environment},
        }

    def _arguments(self, image: Image, hidden: Sequence[str]) -> list[str]:
        arguments = ["--proc", "/proc", "--dev", "/dev", "--size", str(SHM), "--perms", "1777", "--tmpfs", "/dev/shm",
                     "--remount-ro", "/dev", *MASKED]  # fmt: skip
        if image is HOST_IMAGE:
            arguments += ["--ro-bind", "/usr", "/usr", "--perms", "1777", "--dir", "/tmp", "--dir", "/root",
                          "--dir", "/work", "--dir", "/var"]  # fmt: skip
            for name in HOST_LINKS:
                if Path(f"/{name}").is_symlink():
                    arguments += ["--symlink", f"usr/{name}", f"/{name}"]
            for name in HOST_ETC:
                arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for path in (*(HOST_HIDDEN if image is HOST_IMAGE else ()), *hidden):
            if (image.root / path.lstrip("/")).exists():
                nothing = f"{self._launching.stage}/empty" if path.endswith("/") else "/dev/null"
                arguments += ["--ro-bind", nothing, path]
        arguments += ["--chdir", image.config.workdir, "--cap-drop", "ALL"]
        return arguments + [part for name in KEPT_CAPABILITIES for part in ("--cap-add", f"CAP_{name}")]

    async def close(self) -> None:
        """End everything."""
        self._launching.close()
        self._groups.close()
