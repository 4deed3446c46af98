"""Writing files so that nothing half-written is left under their name."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from palaestra.gym.registry import UsageError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for this process alone; made if need be, and gone again if nothing came into it.

    Raises UsageError naming the process that has it, OSError where it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of the folder, which nobody else can lock until it is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise UsageError(f"{folder} is in use by {owner}; wait for its end, or choose another name") from None
        with suppress(FileNotFoundError):  # its last owner may have removed it meanwhile
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Whose lock it is, from the kernel's list."""
    inode = f":{os.fstat(descriptor).st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(inode):
            return f"process {fields[4]}"
    return "another process"


def write_whole(path: Path, content: bytes) -> None:
    """Write the whole file or leave what was there. Raises UsageError naming place and fix (a full disk, say)."""
    try:
        replace(path, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def replace(path: Path, content: bytes) -> None:
    """Write the whole file or leave what was there. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def cannot_write(path: Path, error: OSError) -> UsageError:
    """The one line that says so."""
    return UsageError(f"cannot write {path}: {error.strerror or error}; free space there, or name another place")
