"""The native backend: user namespace, overlay root on a sized tmpfs, bubblewrap, seccomp, control groups, no network."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox import archives, seccomp
from palaestra.environments.sandbox.cgroups import Group, parents
from palaestra.environments.sandbox.shell import SUPERVISOR, Ended, Shell, Streams
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import BoxLimits, Capabilities, Entry, Executed

RANGE, FIRST, SLOTS = 1 << 16, 0x71000000, 4096
"""Ids of one box; where the boxes' ids begin on the host; how many boxes have ids of their own at once."""
SHM, READ, COLLECTED = 64 << 20, 10 << 20, 256 << 20
"""Bytes of shared memory; of a file that is read; of all changed files together."""
LAUNCH_SECONDS = 15.0
NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
KEPT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL", "NET_BIND_SERVICE")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
               "LANG": "C.UTF-8", "TERM": "dumb"}  # fmt: skip
HOST = "host"
"""The image that is made of this machine's own programs: /usr and a few files of /etc, read-only."""
HOST_LINKS = ("bin", "sbin", "lib", "lib64", "lib32")
HOST_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf", "mime.types")
RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 1024}


class Launching:
    """Our end of the launcher: starts it with the first box, and gives it one request for each."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._stage = ""

    async def visit(self, request: Mapping[str, Any], content: bytes) -> bytes:
        """What a visitor of a box answers to `content`. Raises Failure(SANDBOX)."""
        assert self._channel is not None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._channel, [json.dumps(dict(request)).encode()], [theirs.fileno()])
            theirs.close()
            ours.setblocking(False)
            try:
                async with asyncio.timeout(LAUNCH_SECONDS):
                    return await _exchange(ours, content)
            except (OSError, TimeoutError) as error:
                raise Failure(Cause.SANDBOX, f"native: {request['visit']}: {error or 'took too long'}") from error

    async def launch(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """The launcher's answer. Raises Failure(SANDBOX) with what went wrong."""
        channel = self._channel or self._start()
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            socket.send_fds(channel, [json.dumps({**request, "id": number}).encode()], descriptors)
            found = await asyncio.wait_for(answer, LAUNCH_SECONDS)
        except (OSError, TimeoutError) as error:
            raise Failure(Cause.SANDBOX, f"native: the launcher does not answer ({type(error).__name__})") from error
        finally:
            del self._waiting[number]
        if "error" in found:
            raise Failure(Cause.SANDBOX, f"native: {found['error']}")
        return found

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stage = tempfile.mkdtemp(prefix="palaestra-boxes-")
        os.chmod(self._stage, 0o711)  # a box's root is another user
        launcher = str(Path(__file__).with_name("launcher.py"))
        command = [sys.executable, "-I", "-S", launcher, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={}, cwd="/")
        theirs.close()
        config = {"stage": self._stage, "bwrap": shutil.which("bwrap"), "filter": seccomp.program().hex()}
        ours.send(json.dumps(config).encode())
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._read)
        self._channel = ours
        return ours

    def _read(self) -> None:
        assert self._channel is not None
        content = self._channel.recv(1 << 16)
        if not content:
            asyncio.get_running_loop().remove_reader(self._channel)
            for future in self._waiting.values():
                future.set_result({"error": "the launcher ended"})
            return
        answer = json.loads(content)
        if (future := self._waiting.get(answer["id"])) is not None and not future.done():
            future.set_result(answer)

    def close(self) -> None:
        """End the launcher, and with it every box."""
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
        if self._process is not None:
            self._process.wait()
            os.rmdir(self._stage)
        self._process = self._channel = None


async def _exchange(peer: socket.socket, content: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    if content:
        await loop.sock_sendall(peer, content)
    peer.shutdown(socket.SHUT_WR)
    parts = []
    while part := await loop.sock_recv(peer, 1 << 20):
        parts.append(part)
    return b"".join(parts)


class NativeBox:
    """A live box."""

    def __init__(
        self, launching: Launching, pid: int, monitor: int, group: Group, streams: Streams, limits: BoxLimits
    ) -> None:
        self._launching = launching
        self._pid, self._monitor = pid, monitor
        self._init = os.pidfd_open(pid)
        self._group = group
        self._streams = streams
        self._shell = Shell(streams, limits.output, self._stop)
        self._destroyed = False

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        try:
            return await self._shell.exec(command, timeout)
        except Ended:
            raise Failure(Cause.SANDBOX, "native: the box is gone") from None

    async def read(self, path: str) -> bytes:
        """See Box.read."""
        return await self._visit({"visit": "read", "pid": self._pid, "path": path, "limit": READ})

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """See Box.put."""
        await self._visit({"visit": "put", "pid": self._pid}, archives.packed(entries))

    async def write(self, path: str, content: str | bytes) -> None:
        """See Box.write."""
        data = content.encode() if isinstance(content, str) else content
        await self.put({path: Entry("file", 0o644, data)})

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff."""
        return archives.changes(await self._visit({"visit": "diff", "pid": self._monitor, "limit": COLLECTED}))

    async def _visit(self, request: Mapping[str, Any], content: bytes = b"") -> bytes:
        word, ended, answer = (await self._launching.visit(request, content)).partition(b"\n")
        if not ended:
            raise Failure(Cause.SANDBOX, f"native: {request['visit']}: the visitor of the box's files died")
        if word:
            raise OSError(word.decode(errors="replace"))
        return answer

    def _stop(self, since: float) -> None:
        """Kill the processes of the box that began after `since`; with 0 all of them but its init."""
        ticks = since * os.sysconf("SC_CLK_TCK") - 1
        for pid in self._group.processes():
            with suppress(OSError, IndexError):
                if pid not in (self._pid, self._monitor) and _began(pid) >= ticks:
                    os.kill(pid, signal.SIGKILL)

    async def destroy(self) -> None:
        """See Box.destroy."""
        if self._destroyed:
            return
        self._destroyed = True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init, signal.SIGKILL)
        self._streams.close()
        self._group.remove()
        os.close(self._init)


def _began(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


class Native:
    """The backend."""

    capabilities = Capabilities(isolation=True, memory=True, disk_quota=True, processes=True, no_network=True)

    def __init__(self) -> None:
        self._launching = Launching()
        self._slots = itertools.count()

    async def create(self, image: str, limits: BoxLimits) -> NativeBox:
        """See Sandbox.create."""
        slot = next(self._slots) % SLOTS
        group = Group(f"box-{slot}", limits)
        commands, output, statuses = os.pipe(), os.pipe(), os.pipe()
        theirs = [commands[0], output[1], statuses[1]]
        streams = Streams(commands[1], output[0], statuses[0])
        try:
            answer = await self._launching.launch(self._request(image, limits, group, slot), theirs)
        except BaseException:
            streams.close()
            group.remove()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        box = NativeBox(self._launching, answer["pid"], answer["monitor"], group, streams, limits)
        if problem := await box._shell.starts(LAUNCH_SECONDS):
            await box.destroy()
            raise Failure(Cause.SANDBOX, f"native: the box does not start: {problem}")
        return box

    def _request(self, image: str, limits: BoxLimits, group: Group, slot: int) -> dict[str, Any]:
        return {
            "image": "" if image == HOST else image,
            "base": FIRST + RANGE * slot if os.geteuid() == 0 else None,
            "disk": limits.disk,
            "inodes": limits.inodes,
            "groups": [str(folder / "cgroup.procs") for folder in group.folders],
            "rlimits": RLIMITS,
            "namespaces": NAMESPACES,
            "arguments": self._arguments(image),
            "command": ["/bin/sh", "-c", SUPERVISOR],
            "environment": ENVIRONMENT,
        }

    def _arguments(self, image: str) -> list[str]:
        arguments = ["--proc", "/proc", "--dev", "/dev", "--size", str(SHM), "--perms", "1777", "--tmpfs", "/dev/shm",
                     "--remount-ro", "/dev"]  # fmt: skip
        if image == HOST:
            arguments += ["--ro-bind", "/usr", "/usr", "--perms", "1777", "--dir", "/tmp", "--dir", "/root",
                          "--dir", "/work", "--dir", "/var"]  # fmt: skip
            for name in HOST_LINKS:
                if Path(f"/{name}").is_symlink():
                    arguments += ["--symlink", f"usr/{name}", f"/{name}"]
            for name in HOST_ETC:
                arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        arguments += ["--chdir", "/work", "--cap-drop", "ALL"]
        return arguments + [part for name in KEPT_CAPABILITIES for part in ("--cap-add", f"CAP_{name}")]

    async def close(self) -> None:
        """End everything."""
        self._launching.close()
