"""The docker backend: hardened containers of the Docker Engine, through its SDK. `pip install palaestra[docker]`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from palaestra.environments.sandbox import archives, cgroups, images, processes
from palaestra.environments.sandbox.images import HOST
from palaestra.environments.sandbox.shell import SUPERVISOR, Ended, Shell, Streams
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits, Capabilities, Destroyed, Entry, Executed, Process

T = TypeVar("T")

LABEL = "palaestra.owner"
SHM, READ, COLLECTED = 64 << 20, 10 << 20, 256 << 20
START_SECONDS, CALL_SECONDS = 60.0, 120
FILES = ("read", "put", "diff")
AT_ONCE = 4
"""Calls to the daemon at once: on two cores it makes no more containers a second with more."""
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL", "NET_BIND_SERVICE"]
LINKS = 16
REMOVED = 2
"""The kind of a change (Docker Engine API, changes)."""
PATHS = 500
"""Paths of one command line."""
ANSWER = 1 << 20
"""Bytes of what a service of a box answers."""
ASKING = """import socket, sys
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])), float(sys.argv[2]))
peer.sendall(sys.stdin.buffer.read())
left = int(sys.argv[3])
while left >= 0 and (part := peer.recv(65536)):
    left -= len(part)
    sys.stdout.buffer.write(part)
sys.exit(left < 0)"""
NO_IMAGE = "docker: a container needs an image; `palaestra sandbox image build` makes one"
FRAME = struct.Struct(">BxxxL")


class DockerBox:
    """A live container."""

    def __init__(
        self, backend: Docker, container: str, pid: int, peer: socket.socket, limits: BoxLimits, token: str
    ) -> None:
        self._backend = backend
        self._container = container
        self.init = pid
        self._namespace = processes.namespace(pid)
        self._limits = limits
        commands, output, statuses = os.pipe(), os.pipe(), os.pipe()
        self._streams = Streams(commands[1], output[0], statuses[0])
        self._pumps = [
            asyncio.create_task(_pump_in(commands[0], peer)),
            asyncio.create_task(_pump_out(peer, {1: output[1], 2: statuses[1]})),
        ]
        self.shell = Shell(self._streams, limits.output, self._stop, token, marks=True)
        self._destroyed = False

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        try:
            return await self.shell.exec(command, timeout)
        except Ended:
            if self._destroyed:
                raise Failure(Cause.SANDBOX, "docker: the box has been destroyed") from None
        state = await self._backend.call("inspect", lambda api: api.inspect_container(self._container)["State"])
        if state["OOMKilled"]:
            raise Destroyed("the box ran out of memory and was ended")
        raise Failure(Cause.SANDBOX, f"docker: the box is gone (status {state['Status']}, exit {state['ExitCode']})")

    async def read(self, path: str) -> bytes:
        """See Box.read."""
        for _ in range(LINKS):
            member, content = await self._backend.call("read", partial(_file_of, container=self._container, path=path))
            if not member.issym():
                break
            path = os.path.join(os.path.dirname(path), member.linkname)
        if not member.isreg():
            raise OSError(f"{path} is no regular file")
        if member.size > READ:
            raise OSError(f"{path} has {member.size} bytes; the limit is {READ}")
        return content

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """See Box.put."""
        content = archives.packed(entries)
        await self._backend.call("put", lambda api: api.put_archive(self._container, "/", content))

    async def write(self, path: str, content: str | bytes) -> None:
        """See Box.write."""
        await self.put({path: Entry("file", 0o644, content.encode() if isinstance(content, str) else content)})

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff."""
        return await self._backend.call("diff", partial(_changes_of, container=self._container))

    async def processes(self) -> list[Process]:
        """See Box.processes."""
        return processes.described(processes.inside(self._namespace))

    async def ask(self, port: int, request: bytes, timeout: float) -> bytes:
        """See Box.ask. A program of this machine speaks, in the container's network (root alone may send it there)."""
        program = ["nsenter", "--net", f"--target={self.init}", sys.executable, "-I", "-S", "-c", ASKING]
        asking = await asyncio.create_subprocess_exec(
            *program,
            str(port),
            str(timeout),
            str(ANSWER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            answer, _ = await asyncio.wait_for(asking.communicate(request), timeout)
        finally:
            if asking.returncode is None:
                asking.kill()
        if len(answer) > ANSWER:
            raise OSError(f"an answer of more than {ANSWER} bytes")
        if asking.returncode:
            raise ConnectionError(f"nobody answers at port {port}")
        return answer

    def _stop(self, since: float) -> None:
        with suppress(OSError):
            processes.stop(partial(processes.inside, self._namespace), since, (self.init,))

    async def destroy(self) -> None:
        """See Box.destroy."""
        if self._destroyed:
            return
        self._destroyed = True
        await self.shell.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._backend.remove(self, self._container)


async def _pump_in(commands: int, peer: socket.socket) -> None:
    """Carry what is written to a pipe to the container's input. Owns the descriptor."""
    loop = asyncio.get_running_loop()
    os.set_blocking(commands, False)
    try:
        while True:
            await _readable(commands)
            part = os.read(commands, 1 << 16)
            if not part:
                peer.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(peer, part)
    finally:
        os.close(commands)


async def _readable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


async def _writable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_writer(descriptor)


async def _pump_out(peer: socket.socket, pipes: Mapping[int, int]) -> None:
    """Carry the container's outputs to pipes. Owns their descriptors."""
    loop = asyncio.get_running_loop()
    buffer = b""
    for descriptor in pipes.values():
        os.set_blocking(descriptor, False)
    try:
        while part := await loop.sock_recv(peer, 1 << 16):
            frames, buffer = _frames(buffer + part)
            for kind, content in frames:
                await _fill(pipes[kind], content)
    finally:
        for descriptor in pipes.values():
            os.close(descriptor)


async def _fill(descriptor: int, content: bytes) -> None:
    while content:
        try:
            content = content[os.write(descriptor, content) :]
        except BlockingIOError:
            await _writable(descriptor)


def _converse(peer: socket.socket) -> None:
    """Carry our standard input to a container, and its outputs to ours, until it ends."""
    sources: list[Any] = [peer, 0]
    buffer = b""
    peer.setblocking(True)
    while True:
        ready = select.select(sources, [], [])[0]
        if 0 in ready:
            part = os.read(0, 1 << 16)
            peer.sendall(part)
            if not part:
                peer.shutdown(socket.SHUT_WR)
                sources.remove(0)
        if peer in ready:
            part = peer.recv(1 << 16)
            if not part:
                return
            frames, buffer = _frames(buffer + part)
            for kind, content in frames:
                os.write(kind, content)


def _frames(buffer: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The whole frames at the head of a stream (1: output, 2: errors), and the rest (Docker Engine API, attach)."""
    frames = []
    while len(buffer) >= FRAME.size:
        kind, size = FRAME.unpack_from(buffer)
        if len(buffer) < FRAME.size + size:
            break
        frames.append((kind, buffer[FRAME.size : FRAME.size + size]))
        buffer = buffer[FRAME.size + size :]
    return frames, buffer


def _file_of(api: Any, container: str, path: str) -> tuple[tarfile.TarInfo, bytes]:
    """What stands at a path, and its content where that is a regular file of at most READ bytes."""
    stream, _ = api.get_archive(container, path)
    kept = io.BytesIO()
    for part in stream:
        kept.write(part)
        if kept.tell() > READ + (1 << 20):
            break
    kept.seek(0)
    with tarfile.open(fileobj=kept, mode="r|") as archive:
        member = archive.next()
        if member is None:
            raise FileNotFoundError(path)
        file = archive.extractfile(member) if member.isreg() and member.size <= READ else None
        return member, file.read() if file else b""


def _changes_of(api: Any, container: str) -> dict[str, Entry | None]:
    """The container's changed paths, each with what stands there; packed by the box's own tar."""
    changes = api.diff(container) or []
    found: dict[str, Entry | None] = {c["Path"]: None for c in changes if c["Kind"] == REMOVED}
    paths = sorted({c["Path"] for c in changes if c["Kind"] != REMOVED})
    total = 0
    for start in range(0, len(paths), PATHS):
        packed = _packed(api, container, paths[start : start + PATHS], COLLECTED - total)
        total += len(packed)
        found |= archives.changes(packed)
    return found


def _packed(api: Any, container: str, paths: Sequence[str], limit: int) -> bytes:
    names = [path.lstrip("/") for path in paths]
    command = ["tar", "-C", "/", "--numeric-owner", "--no-recursion", "--format=pax", "-cf", "-", "--", *names]
    stream = api.exec_start(api.exec_create(container, command)["Id"], stream=True, demux=True)
    kept = bytearray()
    for content, _ in stream:
        kept += content or b""
        if len(kept) > limit:
            raise OSError(f"the changed files have more bytes than the limit, {COLLECTED}")
    return bytes(kept)


def _provide(api: Any, image: str) -> None:
    """Give the daemon an image of our store where it lacks it. Raises UsageError where neither has it."""
    import docker

    with suppress(docker.errors.ImageNotFound):
        api.inspect_image(image)
        return
    stored = images.find(image)
    name, _, tag = image.partition(":")
    settings = [f"ENV {key}={json.dumps(value)}" for key, value in stored.config.environment.items()]
    command = ["tar", "-C", str(stored.root), "--numeric-owner", "-cf", "-", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packing:
        api.import_image_from_stream(
            packing.stdout,
            repository=name,
            tag=tag or "latest",
            changes=[*settings, f"WORKDIR {stored.config.workdir}"],
        )


def _remove(api: Any, container: str) -> None:
    import docker

    with suppress(docker.errors.NotFound):
        api.remove_container(container, force=True, v=True)


class Docker:
    """The backend. `warm`: how many boxes of the image last asked for are made before they are asked for."""

    def __init__(self, warm: int = 0) -> None:
        self._api = _connect()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._owner = f"{os.getpid()}-{processes.started(os.getpid())}"
        info = self._api.info()
        self._quota = _has_quota(info)
        self.capabilities = Capabilities(
            isolation=True, memory=True, disk_quota=self._quota, processes=True, no_network=True
        )
        self._warm = warm
        self._live: set[DockerBox] = set()
        self._ready: dict[tuple[str, str], list[asyncio.Task[DockerBox]]] = defaultdict(list)
        self._sweep()

    async def call(self, what: str, function: Callable[[Any], T]) -> T:
        """A call to the daemon, in a thread. Raises Failure(SANDBOX), or OSError where files forbid it."""
        import docker
        import requests

        async with self._gate:
            try:
                return await asyncio.to_thread(function, self._api)
            except docker.errors.NotFound as error:
                raise FileNotFoundError(f"{what}: {error.explanation or error}") from error
            except (docker.errors.DockerException, requests.RequestException, ConnectionError) as error:
                if (
                    isinstance(error, docker.errors.APIError) and what in FILES
                ):  # the daemon answers: the box is to blame
                    raise OSError(f"{what}: {error.explanation or error}") from error
                raise Failure(Cause.SANDBOX, f"docker: {what}: {error}") from error

    async def remove(self, box: DockerBox, container: str) -> None:
        """Remove a box's container."""
        self._live.discard(box)
        await self.call("destroy", partial(_remove, container=container))

    async def create(self, image: str, limits: BoxLimits) -> DockerBox:
        """See Sandbox.create. With a warm pool a box may be ready, and another is begun."""
        waiting = self._ready[image, limits.model_dump_json()]
        while len(waiting) < self._warm:
            waiting.append(asyncio.create_task(self._create(image, limits)))
        if not waiting:
            return await self._create(image, limits)
        waiting.append(asyncio.create_task(self._create(image, limits)))
        return await waiting.pop(0)

    async def _create(self, image: str, limits: BoxLimits) -> DockerBox:
        if image == HOST:
            raise Failure(Cause.SANDBOX, NO_IMAGE)
        token = secrets.token_hex(8)
        command = ("/bin/sh", "-c", SUPERVISOR, "sh", token)
        start = partial(self._start, image=image, limits=limits, command=command)
        container, pid, peer = await self.call("create", start)
        box = DockerBox(self, container, pid, peer, limits, token)
        self._live.add(box)
        if problem := await box.shell.starts(START_SECONDS):
            await box.destroy()
            raise Failure(Cause.SANDBOX, f"docker: the box does not start: {problem}")
        return box

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """See Backend.run."""
        if image == HOST:
            raise Failure(Cause.SANDBOX, NO_IMAGE)

        def once(api: Any) -> int:
            container, _, peer = self._start(api, image, limits, command)
            try:
                _converse(peer)
                return int(api.wait(container)["StatusCode"])
            finally:
                _remove(api, container)

        return await self.call("run", once)

    def _start(self, api: Any, image: str, limits: BoxLimits, command: Sequence[str]) -> tuple[str, int, socket.socket]:
        _provide(api, image)
        container = api.create_container(
            image,
            list(command),
            stdin_open=True,
            labels={LABEL: self._owner},
            environment={"HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"},
            network_disabled=True,
            host_config=self._host_config(api, limits),
        )["Id"]
        try:
            attached = api.attach_socket(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            peer: socket.socket = attached._sock
            peer.setblocking(False)
            api.start(container)
            return container, api.inspect_container(container)["State"]["Pid"], peer
        except BaseException:
            _remove(api, container)
            raise

    def _host_config(self, api: Any, limits: BoxLimits) -> Any:
        import docker

        return api.create_host_config(
            network_mode="none",
            mem_limit=limits.memory,
            memswap_limit=limits.memory,
            pids_limit=limits.processes,
            nano_cpus=int(limits.cpus * 1e9),
            cap_drop=["ALL"],
            cap_add=CAPABILITIES,
            security_opt=["no-new-privileges"],
            ipc_mode="private",
            shm_size=SHM,
            log_config=docker.types.LogConfig(type="none"),
            ulimits=[
                docker.types.Ulimit(name="core", soft=0, hard=0),
                docker.types.Ulimit(name="nofile", soft=1024, hard=1024),
            ],
            storage_opt={"size": str(limits.disk)} if self._quota else None,
        )

    def _sweep(self) -> None:
        """Remove the containers whose owner is gone."""
        for container in self._api.containers(all=True, filters={"label": LABEL}):
            pid, _, began = container["Labels"][LABEL].partition("-")
            if not cgroups.lives(int(pid), began):
                _remove(self._api, container["Id"])

    async def close(self) -> None:
        """End every box, and the connection."""
        waiting = [task for tasks in self._ready.values() for task in tasks]
        self._ready.clear()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(box.destroy() for box in list(self._live)), return_exceptions=True)
        self._api.close()


def _has_quota(info: Mapping[str, Any]) -> bool:
    """Whether the daemon can bound a container's disk: overlay2 on xfs, which must be mounted with pquota. Btrfs offers
    it too, but its counts were seen to go wrong as soon as containers are removed."""
    return info["Driver"] == "overlay2" and ["Backing Filesystem", "xfs"] in info.get("DriverStatus", [])


def _connect() -> Any:
    """A client of the daemon that DOCKER_HOST names. Raises UsageError where there is none."""
    try:
        import docker
    except ImportError:
        raise UsageError("sandbox backend docker: its SDK is missing; pip install 'palaestra[docker]'") from None
    try:
        return docker.APIClient(timeout=CALL_SECONDS, **docker.utils.kwargs_from_env())
    except docker.errors.DockerException as error:
        text = str(error).splitlines()[0]
        raise UsageError(f"sandbox backend docker: no daemon answers ({text}); start one, or set DOCKER_HOST") from None
