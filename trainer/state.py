"""Checkpoints of a run: everything that going on needs, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palaestra.gym.registry import UsageError

PREFIX = "step-"


def save(folder: Path, number: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-NUMBER` (state.pt and its hash) and keep the newest `keep`. Raises UsageError (full disk)."""
    target = folder / f"{PREFIX}{number:06d}"
    staged = folder / f".{target.name}.partial"
    buffer = io.BytesIO()
    torch.save({**state, "generators": generators()}, buffer)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _write(staged / "state.pt", buffer.getvalue())
        _write(staged / "sha256", hashlib.sha256(buffer.getvalue()).hexdigest().encode())
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        what = f"cannot write the checkpoint {target}: {error.strerror or error}"
        raise UsageError(f"{what}; free space there, then --resume") from None
    for old in numbered(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint; None where there is none. The generators are set back too.

    Raises UsageError naming a damaged file and the fix.
    """
    found = numbered(folder)
    if not found:
        return None
    path = found[-1] / "state.pt"
    fix = f"delete {found[-1]} to " + ("resume from an older one" if len(found) > 1 else "start the run anew")
    try:
        content = path.read_bytes()
        expected = (found[-1] / "sha256").read_bytes()
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror or error}; {fix}") from None
    if hashlib.sha256(content).hexdigest().encode() != expected:
        raise UsageError(f"{path} is damaged (its sha256 differs); {fix}")
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=False)
    set_generators(state.pop("generators"))
    return state


def generators() -> dict[str, Any]:
    """The states of all global random generators."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def set_generators(state: dict[str, Any]) -> None:
    """Set the global random generators."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
