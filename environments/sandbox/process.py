"""The process backend: a folder and resource limits, and nothing that keeps hostile code out. For trusted code."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from palaestra.environments.sandbox import processes, visitor
from palaestra.environments.sandbox.archives import standing
from palaestra.environments.sandbox.images import HOST
from palaestra.environments.sandbox.shell import SUPERVISOR, Ended, Pipes, Shell
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.sandbox import READ, BoxLimits, Capabilities, Entry, Executed, Process

MARK = "PALAESTRA_BOX"
WORK = "/work"
START_SECONDS = 10.0
WARNING = (
    "sandbox backend `process` isolates nothing: commands run as you, with your files and your network. Use it only "
    "for code that you trust; `palaestra sandbox doctor` says how to get a real one"
)


class ProcessBox:
    """A folder, and a shell in it. Paths below /work are the folder's; there are no others."""

    def __init__(self, folder: Path, limits: BoxLimits) -> None:
        self._folder = folder
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        token = secrets.token_hex(8)
        pipes = Pipes()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _ceilings(limits) + SUPERVISOR, "sh", token],
            stdin=pipes.theirs[0], stdout=pipes.theirs[1], stderr=pipes.theirs[2], cwd=folder, start_new_session=True,
            env=_environment(folder) | dict([self._mark.split("=")]),
        )  # fmt: skip
        pipes.close_theirs()
        self.shell = Shell(pipes.streams, limits.output, self._stop, token)

    async def exec(self, command: str, timeout: float) -> Executed:
        """See Box.exec."""
        try:
            return await self.shell.exec(command, timeout)
        except Ended:
            raise Failure(Cause.SANDBOX, "process: the box is gone") from None

    async def renew(self) -> None:
        """See Box.renew."""
        await self.shell.renew(self._end_shell)

    def _end_shell(self) -> None:
        with suppress(OSError):
            processes.kill(processes.shells(processes.marked(self._mark), self._process.pid))

    async def read(self, path: str) -> bytes:
        """See Box.read."""
        place = self._place(path)
        if not stat.S_ISREG(place.stat().st_mode):
            raise OSError(f"{path} is no regular file")
        if place.stat().st_size > READ:
            raise OSError(f"{path} has {place.stat().st_size} bytes; the limit is {READ}")
        return place.read_bytes()

    async def put(self, entries: Mapping[str, Entry]) -> None:
        """See Box.put. Owners are left as they are."""
        for path, entry in sorted(entries.items()):
            place = self._place(path)
            visitor.folder(str(place.parent), followed=True)
            if entry.kind == "directory":
                visitor.folder(str(place), followed=False)
            else:
                visitor.clear(str(place))
            if entry.kind == "link":
                place.symlink_to(entry.content.decode())
                continue
            if entry.kind == "file":
                place.write_bytes(entry.content)
            place.chmod(entry.mode)

    async def write(self, path: str, content: str | bytes) -> None:
        """See Box.write."""
        await self.put({path: Entry("file", 0o644, content.encode() if isinstance(content, str) else content)})

    async def diff(self) -> Mapping[str, Entry | None]:
        """See Box.diff. The folder is empty at first: all that is in it has changed."""
        return {
            f"{WORK}/{place.relative_to(self._folder)}": standing(place) for place in sorted(self._folder.rglob("*"))
        }

    async def processes(self) -> list[Process]:
        """See Box.processes."""
        return processes.described(processes.marked(self._mark))

    async def ask(self, port: int, request: bytes, timeout: float) -> bytes:
        """See Box.ask. The loopback is this machine's."""
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            try:
                return await reader.read()
            finally:
                writer.close()

    def _place(self, path: str) -> Path:
        if path != WORK and not path.startswith(f"{WORK}/"):
            raise OSError(f"{path}: a box of the process backend has no other folder than {WORK}")
        return self._folder / path.removeprefix(WORK).lstrip("/")

    def _stop(self, since: float) -> None:
        processes.stop(partial(processes.marked, self._mark), since, (self._process.pid,))

    async def destroy(self) -> None:
        """See Box.destroy."""
        if not self._folder.exists():
            return
        self._process.kill()
        deadline = time.monotonic() + START_SECONDS
        while list(processes.marked(self._mark)) and time.monotonic() < deadline:
            processes.stop(partial(processes.marked, self._mark), 0)
            self._process.poll()
            await asyncio.sleep(0)
        self._process.wait()
        await self.shell.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _ceilings(limits: BoxLimits) -> str:
    return f"ulimit -c 0; ulimit -v {limits.memory // 1024}; ulimit -f {limits.disk // 512}; "


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LANG": "C.UTF-8", "TERM": "dumb"}


def _refuse_image(image: str) -> None:
    if image != HOST:
        raise Failure(Cause.SANDBOX, f"process: cannot use the image {image!r}; a process has no root of its own")


class ProcessBackend:
    """The backend."""

    capabilities = Capabilities(isolation=False, memory=False, disk_quota=False, processes=False, no_network=False)

    def __init__(self) -> None:
        warnings.warn(WARNING, stacklevel=2)

    async def create(self, image: str, limits: BoxLimits) -> ProcessBox:
        """See Sandbox.create. The only image is `host`: this machine as it is."""
        _refuse_image(image)
        box = ProcessBox(Path(tempfile.mkdtemp(prefix="palaestra-box-")), limits)
        if problem := await box.shell.starts(START_SECONDS):
            await box.destroy()
            raise Failure(Cause.SANDBOX, f"process: the box does not start: {problem}")
        return box

    async def run(self, image: str, limits: BoxLimits, command: Sequence[str]) -> int:
        """See Backend.run."""
        _refuse_image(image)
        script = _ceilings(limits) + 'exec "$@"'
        with tempfile.TemporaryDirectory(prefix="palaestra-box-") as folder:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", script, "sh", *command, cwd=folder, env=_environment(Path(folder))
            )
            return await process.wait()

    async def close(self) -> None:
        """Nothing is shared."""
