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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from palaestra.environments.sandbox import archives, images, processes, seccomp
from palaestra.environments.sandbox.cgroups import Group, disown, parents, sweep
from palaestra.environments.sandbox.images import HOST, Config, Image
from palaestra.environments.sandbox.shell import SUPERVISOR, Ended, Shell, Streams
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import BoxLimits, Capabilities, Destroyed, Entry, Executed, Process

RANGE, FIRST, SLOTS = 1 << 16, 0x71000000, 4096
"""Ids of one box; where the boxes' ids begin on the host; how many boxes have ids of their own at once."""
SHM, READ, COLLECTED = 64 << 20, 10 << 20, 256 << 20
"""Bytes of shared memory; of a file that is read; of all changed files together."""
LAUNCH_SECONDS = 15.0
AT_ONCE = 8
"""Requests to the launcher under way, which serves one after the other: more would not fit into its socket."""
NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
KEPT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL", "NET_BIND_SERVICE")
ENVIRONMENT = {"HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
HOST_LINKS = ("bin", "sbin", "lib", "lib64", "lib32")
HOST_ETC = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "passwd",
    "group",
    "nsswitch.conf",
    "mime.types",
)
HOST_IMAGE = Image(Path("/"), Config(workdir="/work"))
RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 1024}


class Launching:
    """Our end of the launcher: starts it with the first box, and gives it one request for each."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._stage = ""

    async def visit(self, request: Mapping[str, Any], content: bytes) -> bytes:
        """What a visitor of a box answers to `content`. Raises Failure(SANDBOX)."""
        assert self._channel is not None
        async with self._gate:
            return await self._visited(self._channel, request, content)

    async def _visited(self, channel: socket.socket, request: Mapping[str, Any], content: bytes) -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            try:
                socket.send_fds(channel, [json.dumps(dict(request)).encode()], [theirs.fileno()])
                theirs.close()
                async with asyncio.timeout(LAUNCH_SECONDS):
                    return await _exchange(ours, content)
            except (OSError, TimeoutError) as error:
                raise Failure(Cause.SANDBOX, f"native: {request['visit']}: {error or 'took too long'}") from error

    async def launch(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """The launcher's answer. Raises Failure(SANDBOX) with what went wrong."""
        async with self._gate:
            return await self._launched(self._channel or self._start(), request, descriptors)

    async def _launched(
        self, channel: socket.socket, request: Mapping[str, Any], descriptors: list[int]
    ) -> dict[str, Any]:
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
        self,
        launching: Launching,
        image: Image,
        answer: Mapping[str, Any],
        group: Group,
        streams: Streams,
        limits: BoxLimits,
    ) -> None:
        self._launching = launching
        self._image = image
        self.baseline: Mapping[str, Entry | None] = {}
        self.init, self._monitor = answer["pid"], answer["monitor"]
        self._handle = os.pidfd_open(self.init)
        self._group = group
        self._streams = streams
        self.shell = Shell(streams, limits.output, self._stop)
        self._destroyed = False

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        try:
            return await self.shell.exec(command, timeout)
        except Ended:
            if self._group.killed():
                raise Destroyed("the box ran out of memory and was ended") from None
            raise Failure(Cause.SANDBOX, "native: the box is gone") from None

    async def read(self, path: str) -> bytes:
        """See Box.read."""
        return await self._visit({"visit": "read", "pid": self.init, "path": path, "limit": READ})

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """See Box.put."""
        await self._visit({"visit": "put", "pid": self.init}, archives.packed(entries))

    async def write(self, path: str, content: str | bytes) -> None:
        """See Box.write."""
        data = content.encode() if isinstance(content, str) else content
        await self.put({path: Entry("file", 0o644, data)})

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff."""
        return archives.beyond(self.baseline, await self.layer())

    async def layer(self) -> Mapping[str, Entry | None]:
        """The whole writable layer, the baseline included."""
        packed = await self._visit({"visit": "diff", "pid": self._monitor, "limit": COLLECTED})
        return archives.changes(packed, None if self._image is HOST_IMAGE else self._image.root)

    async def processes(self) -> list[Process]:
        """See Box.processes."""
        return processes.described(processes.beside(self.init))

    async def ask(self, port: int, request: bytes, timeout: float) -> bytes:
        """See Box.ask."""
        return await self._visit({"visit": "ask", "pid": self.init, "port": port, "timeout": timeout}, request)

    async def _visit(self, request: Mapping[str, Any], content: bytes = b"") -> bytes:
        word, ended, answer = (await self._launching.visit(request, content)).partition(b"\n")
        if not ended:
            raise Failure(Cause.SANDBOX, f"native: {request['visit']}: the visitor of the box's files died")
        if word:
            raise OSError(word.decode(errors="replace"))
        return answer

    def _stop(self, since: float) -> None:
        with suppress(OSError):
            processes.stop(processes.beside(self.init), since, (self.init,))

    async def destroy(self) -> None:
        """See Box.destroy."""
        if self._destroyed:
            return
        self._destroyed = True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self._streams.close()
        await _gone(self._handle)
        self._group.remove()
        os.close(self._handle)


async def _gone(init: int) -> None:
    """Wait until a namespace's init has ended, which the kernel lets it when all in it have. Raises Failure."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(init, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), LAUNCH_SECONDS)
    except TimeoutError:
        raise Failure(Cause.SANDBOX, f"native: a killed box still lives after {LAUNCH_SECONDS:g} s") from None
    finally:
        loop.remove_reader(init)


class Native:
    """The backend. What needs control groups is enforced where this user may make them."""

    def __init__(self) -> None:
        groups = parents()
        self.capabilities = Capabilities(
            isolation=True, memory="memory" in groups, disk_quota=True, processes="pids" in groups, no_network=True
        )
        self._launching = Launching()
        self._slots = itertools.count()
        self._skeleton: Mapping[str, Entry | None] = {}
        sweep()

    async def create(self, image: str, limits: BoxLimits) -> NativeBox:
        """See Sandbox.create."""
        return await self.of(HOST_IMAGE if image == HOST else images.find(image), limits)

    async def of(self, image: Image, limits: BoxLimits) -> NativeBox:
        """A fresh box of an image at hand."""
        commands, output, statuses = os.pipe(), os.pipe(), os.pipe()
        theirs = [commands[0], output[1], statuses[1]]
        streams = Streams(commands[1], output[0], statuses[0])
        try:
            box = await self._start(image, limits, ["/bin/sh", "-c", SUPERVISOR], theirs, streams)
        except BaseException:
            streams.close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        if problem := await box.shell.starts(LAUNCH_SECONDS):
            await box.destroy()
            raise Failure(Cause.SANDBOX, f"native: the box does not start: {problem}")
        if image is HOST_IMAGE:
            self._skeleton = self._skeleton or await box.layer()
            box.baseline = self._skeleton
        return box

    async def _start(
        self, found: Image, limits: BoxLimits, command: Sequence[str], descriptors: Sequence[int], streams: Streams
    ) -> NativeBox:
        slot = next(self._slots)
        group = Group(f"box-{slot}", limits)
        request = {
            "image": "" if found is HOST_IMAGE else str(found.root),
            "base": FIRST + RANGE * (slot % SLOTS) if os.geteuid() == 0 else None,
            "disk": limits.disk,
            "inodes": limits.inodes,
            "groups": [str(folder / "cgroup.procs") for folder in group.folders],
            "rlimits": RLIMITS,
            "namespaces": NAMESPACES,
            "arguments": self._arguments(found),
            "command": list(command),
            "environment": {**ENVIRONMENT, **found.config.environment},
        }
        try:
            answer = await self._launching.launch(request, list(descriptors))
        except BaseException:
            group.remove()
            raise
        return NativeBox(self._launching, found, answer, group, streams, limits)

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """Run one command in a fresh box with our standard input, output and errors; its exit status."""
        nothing, statuses = os.pipe(), os.pipe()
        streams = Streams(nothing[1], nothing[0], statuses[0])
        script = ["/bin/sh", "-c", '"$@" 3>&-; echo "ended $?" >&3', "sh", *command]
        try:
            found = HOST_IMAGE if image == HOST else images.find(image)
            box = await self._start(found, limits, script, [0, 1, 2, statuses[1]], streams)
        except BaseException:
            streams.close()
            raise
        finally:
            os.close(statuses[1])
        try:
            return await box.shell.ends()
        finally:
            await box.destroy()

    def _arguments(self, image: Image) -> list[str]:
        arguments = ["--proc", "/proc", "--dev", "/dev", "--size", str(SHM), "--perms", "1777", "--tmpfs", "/dev/shm",
                     "--remount-ro", "/dev"]  # fmt: skip
        if image is HOST_IMAGE:
            arguments += ["--ro-bind", "/usr", "/usr", "--perms", "1777", "--dir", "/tmp", "--dir", "/root",
                          "--dir", "/work", "--dir", "/var"]  # fmt: skip
            for name in HOST_LINKS:
                if Path(f"/{name}").is_symlink():
                    arguments += ["--symlink", f"usr/{name}", f"/{name}"]
            for name in HOST_ETC:
                arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        arguments += ["--chdir", image.config.workdir, "--cap-drop", "ALL"]
        return arguments + [part for name in KEPT_CAPABILITIES for part in ("--cap-add", f"CAP_{name}")]

    async def close(self) -> None:
        """End everything."""
        self._launching.close()
        disown()
