"""The base image: Debian with what terminal and SWE tasks use, made by debootstrap without a registry, or by Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from palaestra.environments.sandbox.images import Image, import_image
from palaestra.gym.registry import UsageError

NAME = "palaestra/base"
SUITE = "bookworm"
PACKAGES = (
    "python3", "python3-venv", "git", "sqlite3", "make", "gcc", "libc6-dev", "procps", "patch", "less", "file", "curl",
    "zip", "unzip", "xz-utils", "bzip2", "jq", "ca-certificates",
)  # fmt: skip
UNNEEDED = ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
DOCKERFILE = f"""FROM debian:{SUITE}-slim
RUN apt-get update && apt-get install -y --no-install-recommends {" ".join(PACKAGES)} \\
 && rm -rf {" ".join(f"/{folder}/*" for folder in UNNEEDED)} && mkdir -p /work
WORKDIR /work
"""
MINUTES = 30


def build(name: str = NAME, registry: bool = False, say: Callable[[str], None] = print) -> Image:
    """Make the base image and store it under `name`: by debootstrap, or with `registry` from Docker's debian image.

    Raises UsageError naming what is missing or went wrong.
    """
    with tempfile.TemporaryDirectory(prefix="palaestra-image-") as scratch:
        made = (_by_docker if registry else _by_debootstrap)(Path(scratch), say)
        say(f"storing {name}")
        return import_image(made, name)


def _by_debootstrap(scratch: Path, say: Callable[[str], None]) -> Path:
    if os.geteuid() != 0:
        raise UsageError("image build: debootstrap must be run by root; or use --registry with Docker")
    root = scratch / "root"
    say(f"debootstrap {SUITE}, {len(PACKAGES)} packages")
    _run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)])
    for folder in UNNEEDED:
        for path in (root / folder).glob("*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "work").mkdir()
    return root


def _by_docker(scratch: Path, say: Callable[[str], None]) -> Path:
    (scratch / "Dockerfile").write_text(DOCKERFILE)
    say("docker build")
    _run(["docker", "build", "--tag", NAME, str(scratch)])
    _run(["docker", "save", "--output", str(scratch / "image.tar"), NAME])
    return scratch / "image.tar"


def _run(command: Sequence[str]) -> None:
    if shutil.which(command[0]) is None:
        raise UsageError(f"image build: {command[0]} is not installed (Debian: apt-get install {command[0]})")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    if done.returncode:
        raise UsageError(f"image build: {' '.join(command[:2])} failed: {(done.stderr or done.stdout)[-600:].strip()}")
