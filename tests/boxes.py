"""What the sandbox tests share: the backends of this machine, and programs that run in a box."""

from __future__ import annotations

import shlex

from palaestra.environments.sandbox.backends import lacks_native
from palaestra.gym.sandbox import BoxLimits

SMALL = BoxLimits(memory=128 << 20, disk=24 << 20, inodes=2000, processes=64, cpus=1.0, output=64 << 10)
ISOLATING = [*([] if lacks_native() else ["native"])]


def python(code: str) -> str:
    """A shell command that runs Python in the box."""
    return f"python3 -c {shlex.quote(code)}"


def call(number: int, *arguments: str) -> str:
    """A shell command that makes a system call and prints its result and errno."""
    listed = ", ".join(("", *arguments))
    return python(
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
        f"print('result', libc.syscall({number}{listed}), 'errno', ctypes.get_errno())"
    )
