"""Writing files so that nothing half-written is left under their name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from palaestra.gym.registry import UsageError


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
