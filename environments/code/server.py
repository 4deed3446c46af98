"""The fork server of replies' processes, run as a program of its own that never sees a test, nor a reply.

For every channel that it is handed it forks a supervisor, which leaves the namespaces that the kernel lets it leave and
forks a process that gives up its user, takes limits on and answers on the channel (reply.py). Whatever that starts ends
with its supervisor, a new session or group notwithstanding.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # alone, by its path, there is no package
import reply  # noqa: E402

sys.path.remove(str(HERE))

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
NEW_NAMESPACES = 0x20000000 | 0x08000000 | 0x40000000 | NEW_MOUNTS  # pid, ipc, net, mount
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
MS_PRIVATE_ALL = (1 << 18) | (1 << 14)
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
CAPSET, CAPABILITY_VERSION = 126, 0x20080522
FIRST_UID = 300_000
PROCESSES = 32
NUMBER = struct.Struct("<I")
TRY = "try"
"""In the place of the socket: end with status 0 if the namespaces can be left."""
SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")
HIDDEN = (str(HERE.parents[1]),)
"""Where our own files are: the data with the right answers among them."""

# Loaded before the user is given up: the interpreter's library may lie where another user cannot read.
COMMON = """
    abc argparse array ast base64 bisect calendar cmath collections collections.abc contextlib copy csv dataclasses
    datetime decimal difflib enum fractions functools glob graphlib hashlib heapq html inspect io itertools json
    linecache locale logging math numbers operator pathlib pickle pprint queue random re secrets shutil statistics
    string struct subprocess sys tempfile textwrap threading time timeit traceback types typing unicodedata unittest
    uuid warnings weakref zlib
    """.split()  # noqa: SIM905 (a word list reads better as text)

_libc = ctypes.CDLL(None, use_errno=True)


def _mount(kind: str, folder: str, options: str) -> None:
    _libc.mount(kind.encode(), folder.encode(), kind.encode(), 0, options.encode())


def leave_namespaces() -> bool:
    """New process, network, IPC and mount namespaces, an ordinary user's in a user namespace; read-only but for
    private scratch folders. False where the kernel refuses."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(NEW_NAMESPACES | (NEW_USER if user else 0)) != 0:
        return False
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    _libc.mount(b"none", b"/", None, MS_PRIVATE_ALL, None)
    read_only = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only))
    for folder in SCRATCH:
        _mount("tmpfs", folder, "size=4m,nr_inodes=256,mode=1777")
    for folder in HIDDEN:
        _mount("tmpfs", folder, "size=4k,nr_inodes=2,mode=0755")
    return True


def _see_own_processes_alone() -> None:
    """The supervisor, outside the process namespace, keeps the /proc that it reads."""
    _libc.unshare(NEW_MOUNTS)
    _mount("proc", "/proc", "")


def _give_up_user(number: int) -> None:
    if os.getuid() == 0:
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))  # counted by user, so by this one's alone
        uid = FIRST_UID + number % 60_000
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:  # of its user namespace, where it has one
        _libc.syscall(CAPSET, struct.pack("II", CAPABILITY_VERSION, 0), bytes(24))
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _supervise(channel: socket.socket, number: int) -> None:
    """Supervise a process that answers; at SIGTERM, or when it ends, end it and everything that it started."""
    waited = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.setsid()
    alone = leave_namespaces()
    if os.fork():
        channel.close()
        signal.sigwait(waited)
        _end_offspring()
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
    os.chdir("/")
    if alone:
        _see_own_processes_alone()
    reply.limit()
    _give_up_user(number)
    reply.serve(reply.Pair(channel))


def _end_offspring() -> None:
    """Kill the children until there is none: as their subreaper we inherit what they leave behind."""
    with contextlib.suppress(ChildProcessError):
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                for child in children.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def serve(control: socket.socket) -> None:
    """Fork a supervisor for every channel that comes, and answer with its process id."""
    for name in COMMON:
        importlib.import_module(name)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    number = os.getpid()
    while True:
        word, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        number += 1
        child = os.fork()
        if not child:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _supervise(socket.socket(fileno=descriptors[0]), number)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.sendall(NUMBER.pack(child))


if __name__ == "__main__":
    if sys.argv[1] == TRY:
        sys.exit(not leave_namespaces())
    serve(socket.socket(fileno=int(sys.argv[1])))
