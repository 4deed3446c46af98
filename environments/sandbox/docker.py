"""The docker backend: hardened containers of the Docker Engine, through its SDK. `pip install palaestra[docker]`."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from palaestra.environments.sandbox import archives, cgroups, images, processes
from palaestra.environments.sandbox.base import NAME
from palaestra.environments.sandbox.images import HOST
from palaestra.environments.sandbox.launching import Launching
from palaestra.environments.sandbox.shell import SUPERVISOR, Pipes
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
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import BoxLimits, Capabilities, Destroyed, Entry

T = TypeVar("T")

LABEL = "palaestra.owner"
START_SECONDS, CALL_SECONDS = 60.0, 120
AT_ONCE = 4
"""Calls to the daemon at once: on two cores it makes no more containers a second with more."""
ONCE = 'read -r go; exec "$@"'
"""Becomes a command, once it is told to."""
NO_IMAGE = (
    f"docker: a container has no image {HOST!r}; `palaestra sandbox image build` makes one, to be named: image={NAME}"
)
FRAME = struct.Struct(">BxxxL")


class DockerBox(VisitedBox):
    """A live container."""

    owns = 0

    def __init__(
        self, backend: Docker, container: str, pid: int, peer: socket.socket, limits: BoxLimits, token: str
    ) -> None:
        self._backend = backend
        self._container = container
        self._peer = peer
        pipes = Pipes()
        try:
            super().__init__(backend.launching, pid, pipes.streams, limits, token, marks=True)
        except OSError:
            pipes.close_theirs()
            pipes.streams.close()
            raise
        commands, output, statuses = pipes.theirs
        self._pumps = [
            asyncio.create_task(_pump_in(commands, peer)),
            asyncio.create_task(_pump_out(peer, {1: output, 2: statuses})),
        ]

    async def _lost(self) -> Exception:
        if self._destroyed:
            return Failure(Cause.SANDBOX, "docker: the box has been destroyed")
        if await self._stays():
            return Destroyed("the box has no shell any more")
        state = await self._backend.call("inspect", lambda api: api.inspect_container(self._container)["State"])
        if state["OOMKilled"]:
            return Destroyed("the box ran out of memory and was ended")
        return Failure(Cause.SANDBOX, f"docker: the box is gone (status {state['Status']}, exit {state['ExitCode']})")

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff."""
        upper, lowers = layers(self.init)
        packed = await self._visited({"visit": "diff", "limit": COLLECTED, "layer": upper, "enter": 0}, self._handle)
        return await asyncio.to_thread(archives.changes, packed, lowers)

    async def destroy(self) -> None:
        """See Box.destroy."""
        if self._destroyed:
            return
        self._destroyed = True
        await self.shell.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        os.close(self._handle)
        await self._backend.remove(self, self._container, self._peer)


def layers(pid: int) -> tuple[str, list[Path]]:
    """The writable layer of a container, and those below it, from the mounts of a process of it.

    Raises Failure(SANDBOX) where its root is no overlay, or lies where this process cannot see it.
    """
    try:
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        options = next(fields[-1] for fields in mounts if fields[4] == "/" and fields[-3] == "overlay")
    except (OSError, StopIteration):
        raise Failure(
            Cause.SANDBOX, "docker: a container's root is no overlay; use the storage driver overlay2"
        ) from None
    given = dict(option.partition("=")[::2] for option in options.split(","))
    upper = given["upperdir"]
    if not os.path.isdir(upper):
        raise Failure(Cause.SANDBOX, f"docker: the daemon's files ({upper}) are not to be seen from here")
    storage = Path(upper).parents[1]  # the daemon names layers from there, where the names would be too long
    return upper, [storage / lower for lower in given["lowerdir"].split(":")]


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
    waiting = select.poll()
    for source in (peer.fileno(), 0):
        waiting.register(source, select.POLLIN)
    buffer = b""
    peer.setblocking(True)
    peer.sendall(b"go\n")
    while True:
        ready = [source for source, _ in waiting.poll()]
        if 0 in ready:
            part = os.read(0, 1 << 16)
            peer.sendall(part)
            if not part:
                peer.shutdown(socket.SHUT_WR)
                waiting.unregister(0)
        if peer.fileno() in ready:
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
    """The backend. Looks into containers from this machine: needs its root, and a daemon that runs on it."""

    def __init__(self) -> None:
        self._api = _connect()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._owner = f"{os.getpid()}-{processes.started(os.getpid())}-{id(self):x}"
        self._quota = _has_quota(self._api.info())
        self.launching = Launching("docker")
        self.capabilities = Capabilities(
            isolation=True, memory=True, disk_quota=self._quota, processes=True, no_network=True
        )
        self._live: set[DockerBox] = set()
        self._endings: set[asyncio.Future[None]] = set()
        self._sweep()

    async def call(self, what: str, function: Callable[[Any], T]) -> T:
        """A call to the daemon, in a thread. Raises Failure(SANDBOX)."""
        import docker
        import requests

        async with self._gate:
            try:
                return await asyncio.to_thread(function, self._api)
            except (docker.errors.DockerException, requests.RequestException, ConnectionError) as error:
                raise Failure(Cause.SANDBOX, f"docker: {what}: {error}") from error

    async def remove(self, box: DockerBox, container: str, peer: socket.socket) -> None:
        """Remove a box's container."""
        self._live.discard(box)
        await self._end(container, peer)

    async def create(self, image: str, limits: BoxLimits) -> DockerBox:
        """See Sandbox.create."""
        token = secrets.token_hex(8)
        container, pid, peer = await self._begun(image, limits, SUPERVISOR, token)
        try:
            box = DockerBox(self, container, pid, peer, limits, token)
        except OSError as error:
            await self._end(container, peer)
            raise Failure(Cause.SANDBOX, f"docker: the box ended at once: {error}") from error
        self._live.add(box)
        try:
            if problem := await box.shell.starts(START_SECONDS):
                raise Failure(Cause.SANDBOX, f"docker: the box does not start: {problem}")
            if not limits.loopback:
                await silence(self.launching, pid, 0)
        except BaseException:
            await box.destroy()
            raise
        return box

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """See Backend.run."""
        container, pid, peer = await self._begun(image, limits, ONCE, *command)
        try:
            if not limits.loopback:
                await silence(self.launching, pid, 0)
            await asyncio.to_thread(_converse, peer)
            return await self.call("wait", lambda api: int(api.wait(container)["StatusCode"]))
        finally:
            await self._end(container, peer)

    async def _begun(
        self, image: str, limits: BoxLimits, script: str, *arguments: str
    ) -> tuple[str, int, socket.socket]:
        """A container that runs a shell script: its name, its init, what it reads and writes."""
        if image == HOST:
            raise UsageError(NO_IMAGE)
        command = ("/bin/sh", "-c", script, "sh", *arguments)
        starting = asyncio.ensure_future(
            self.call("create", partial(self._start, image=image, limits=limits, command=command))
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._forsake)
            raise

    def _forsake(self, starting: asyncio.Future[tuple[str, int, socket.socket]]) -> None:
        """End a container that nobody waits for any more."""
        if not starting.cancelled() and starting.exception() is None:
            container, _, peer = starting.result()
            ending = asyncio.ensure_future(self._end(container, peer))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _end(self, container: str, peer: socket.socket) -> None:
        peer.close()
        await self.call("destroy", partial(_remove, container=container))

    def _start(self, api: Any, image: str, limits: BoxLimits, command: Sequence[str]) -> tuple[str, int, socket.socket]:
        _provide(api, image)
        container = api.create_container(
            image,
            list(command),
            stdin_open=True,
            labels={LABEL: self._owner},
            environment=ENVIRONMENT,
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
            cap_add=list(KEPT_CAPABILITIES),
            security_opt=["no-new-privileges"],
            ipc_mode="private",
            shm_size=SHM,
            log_config=docker.types.LogConfig(type="none"),
            ulimits=[
                docker.types.Ulimit(name="core", soft=0, hard=0),
                docker.types.Ulimit(name="nofile", soft=FILES, hard=FILES),
            ],
            tmpfs={path: "ro,size=4k" for path in limits.hidden if path.endswith("/")},
            binds=[f"/dev/null:{path}:ro" for path in limits.hidden if not path.endswith("/")],
            storage_opt={"size": str(limits.disk)} if self._quota else None,
        )

    def _sweep(self) -> None:
        """Remove the containers whose owner is gone."""
        for container in self._api.containers(all=True, filters={"label": LABEL}):
            pid, began = container["Labels"][LABEL].split("-")[:2]
            if not cgroups.lives(int(pid), began):
                _remove(self._api, container["Id"])

    async def close(self) -> None:
        """End every box, and the connection."""
        await asyncio.gather(*(box.destroy() for box in list(self._live)), *self._endings, return_exceptions=True)
        with suppress(Failure):
            await self.call("close", partial(_remove_all, owner=self._owner))
        self.launching.close()
        self._api.close()


def _remove_all(api: Any, owner: str) -> None:
    for container in api.containers(all=True, filters={"label": f"{LABEL}={owner}"}):
        _remove(api, container["Id"])


def _has_quota(info: Mapping[str, Any]) -> bool:
    """Whether the daemon can bound a container's disk: overlay2 on xfs that is mounted with project quotas. Btrfs
    offers it too, but its counts were seen to go wrong as soon as containers are removed."""
    if info["Driver"] != "overlay2" or ["Backing Filesystem", "xfs"] not in info.get("DriverStatus", []):
        return False
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    above = [fields for fields in mounts if Path(info["DockerRootDir"]).is_relative_to(fields[4])]
    options = max(above, key=lambda fields: len(fields[4]))[-1].split(",")
    return bool({"pquota", "prjquota"} & set(options))


def _connect() -> Any:
    """A client of the daemon that DOCKER_HOST names. Raises UsageError where there is none that can be used."""
    try:
        import docker
    except ImportError:
        raise UsageError("sandbox backend docker: its SDK is missing; pip install 'palaestra[docker]'") from None
    if os.geteuid() != 0:
        raise UsageError("sandbox backend docker: only root may look into containers; run as root, or use native")
    if not (address := os.environ.get("DOCKER_HOST", "unix://")).startswith("unix://"):
        raise UsageError(f"sandbox backend docker: the daemon must run on this machine; DOCKER_HOST is {address}")
    try:
        return docker.APIClient(timeout=CALL_SECONDS, **docker.utils.kwargs_from_env())
    except docker.errors.DockerException as error:
        text = str(error).splitlines()[0]
        raise UsageError(f"sandbox backend docker: no daemon answers ({text}); start one, or set DOCKER_HOST") from None
