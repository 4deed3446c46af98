"""Starts boxes: a small single-threaded process that forks, enters namespaces, mounts, and executes bubblewrap.

Run as a script (`python -I -S launcher.py FD`), with nothing but the standard library, so that forking it is cheap. It
serves requests on the SOCK_SEQPACKET socket FD, one JSON object each with the descriptors that become the box's first
ones (0, 1, 2, ...), and answers with the process that is the box's init. When its owner ends, which closes the socket
and sends SIGTERM, it ends every box and itself: box by box, for a bubblewrap that is killed while it starts its child
leaves that behind, waiting for ever.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_EMPTY_PATH, MOVE_MOUNT_F_EMPTY_PATH = 1, 0o2000000, 0x1000, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 1, 2, 4, 0x100000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
PR_SET_PDEATHSIG = 1
INFO_SECONDS = 10.0
FREE = 64
"""The lowest descriptor that no box is given."""
MESSAGE = 1 << 16

sys.path.insert(0, str(Path(__file__).parent))  # alone, by its path, there is no package
import visitor  # noqa: E402

libc = ctypes.CDLL(None, use_errno=True)


class LaunchError(Exception):
    """A box could not be started; the text says at which step and why."""


def checked(result: int, what: str) -> int:
    """The result of a C call. Raises LaunchError where it failed."""
    if result < 0:
        raise LaunchError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2)."""
    call = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    checked(call, f"mount {kind} ({options})")


def idmapped(folder: str, user_namespace: int) -> int:
    """A detached read-only mount of `folder` whose owners are mapped as in `user_namespace`."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    tree = checked(libc.syscall(OPEN_TREE, -100, folder.encode(), flags), f"open_tree {folder}")
    wanted = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_IDMAP
    attributes = struct.pack("QQQQ", wanted, 0, 0, user_namespace)
    call = libc.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes))
    checked(call, f"idmapped mount of {folder} (Linux 5.19 or newer is needed)")
    return tree


def map_ids(pid: int, base: int | None) -> None:
    """Map the ids of a new user namespace: 65536 from `base` on, or (None) this user alone, to its root."""
    if base is not None:
        for name in ("uid_map", "gid_map"):
            _write(f"/proc/{pid}/{name}", f"0 {base} 65536")
        return
    _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", f"0 {os.geteuid()} 1")
    _write(f"/proc/{pid}/gid_map", f"0 {os.getegid()} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def received(channel: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its descriptors, which programs that are executed do not inherit."""
    content, descriptors, _, _ = socket.recv_fds(channel, MESSAGE, 8)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return content, descriptors


def kill(monitor: int) -> None:
    """Kill a bubblewrap and, before it, the init of its box. It is stopped first, so that it starts none meanwhile."""
    with suppress(OSError):
        os.kill(monitor, signal.SIGSTOP)
        with open(f"/proc/{monitor}/task/{monitor}/children") as children:
            for child in children.read().split():
                os.kill(int(child), signal.SIGKILL)
    with suppress(OSError):
        os.kill(monitor, signal.SIGKILL)


class Launcher:
    """The serving loop and what every box has in common."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        config = json.loads(channel.recv(MESSAGE))
        self.stage: str = config["stage"]
        self.bwrap: str = config["bwrap"]
        self.filter = os.memfd_create("filter")
        os.write(self.filter, bytes.fromhex(config["filter"]))
        self.monitors: set[int] = set()
        self.leaving = False

    def serve(self) -> None:
        """Answer requests until the owner ends, and tell of boxes that end. Then end all boxes."""
        try:
            self._serve()
        finally:
            for monitor in self.monitors:
                kill(monitor)

    def leave(self, *_: object) -> None:
        """The owner has ended (a signal's handler)."""
        self.leaving = True

    def _serve(self) -> None:
        ended, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        waiting = select.poll()  # select(2) knows no descriptor above 1,023
        for descriptor in (self.channel.fileno(), ended):
            waiting.register(descriptor, select.POLLIN)
        while not self.leaving:
            ready = [descriptor for descriptor, _ in waiting.poll()]
            if ended in ready:
                os.read(ended, 4096)
                self._reap()
            if self.channel.fileno() not in ready:
                continue
            content, descriptors = received(self.channel)
            if not content:
                return
            try:
                request = json.loads(content)
                if "visit" in request:
                    self._visit(request, *descriptors)
                else:
                    self.channel.send(json.dumps(self._answer(request, descriptors)).encode())
            except (ValueError, OSError) as error:  # no box may take the others' launcher away
                print(f"palaestra launcher: {error}", file=sys.stderr)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _reap(self) -> None:
        """Tell how each child ended: a box's bubblewrap ends as its init did (128 and a signal's number)."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.monitors.discard(found[0])
                status = os.waitstatus_to_exitcode(found[1])
                self.channel.send(json.dumps({"ended": found[0], "status": status}).encode())

    def _answer(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        try:
            pid, monitor = self.launch(request, descriptors)
        except (LaunchError, OSError, ValueError) as error:
            return {"id": request["id"], "error": str(error)}
        return {"id": request["id"], "pid": pid, "monitor": monitor}

    def _visit(self, request: dict[str, Any], target: int, stream: int) -> None:
        """Fork a visitor of a box, who speaks with the owner himself."""
        if os.fork() == 0:
            try:
                self.channel.close()
                visitor.answer(request, target, socket.socket(fileno=stream))
            finally:
                os._exit(0)

    def launch(self, request: dict[str, Any], descriptors: list[int]) -> tuple[int, int]:
        """Start a box; returns the host's number of its init, and of the bubblewrap process above it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        info_read, info_write = os.pipe()
        monitor = os.fork()
        if monitor == 0:
            ours.close()
            os.close(info_read)
            self._become_box(request, descriptors, theirs, info_write)
        theirs.close()
        os.close(info_write)
        try:
            self.monitors.add(monitor)
            self._prepare(monitor, request, ours)
            return self._init_of(info_read, ours), monitor
        except BaseException:
            kill(monitor)
            raise
        finally:
            ours.close()
            os.close(info_read)

    def _prepare(self, pid: int, request: dict[str, Any], child: socket.socket) -> None:
        """The parent's part: wait for the child's namespaces, map its ids, hand it its image."""
        self._expect(child)
        map_ids(pid, request["base"])
        trees = []
        if request["image"] and request["base"] is not None:
            namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                trees = [idmapped(request["image"], namespace)]
            finally:
                os.close(namespace)
        try:
            socket.send_fds(child, [b"mapped"], trees)
        finally:
            for tree in trees:
                os.close(tree)

    def _expect(self, child: socket.socket) -> None:
        """The child's next word; an empty one is its end. Raises LaunchError with what it says went wrong."""
        child.settimeout(INFO_SECONDS)
        word = child.recv(MESSAGE).decode()
        if word != "ready":
            raise LaunchError(word or "the box's first process ended at once")

    def _init_of(self, descriptor: int, child: socket.socket) -> int:
        """The `child-pid` that bubblewrap writes. Raises LaunchError where it ends instead."""
        text = ""
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        while "}" not in text:
            if not waiting.poll(INFO_SECONDS * 1000):
                raise LaunchError(f"bubblewrap said nothing for {INFO_SECONDS:g} s")
            part = os.read(descriptor, 4096).decode()
            if not part:
                raise LaunchError(child.recv(MESSAGE).decode() or "bubblewrap ended at once")
            text += part
        return int(json.loads(text)["child-pid"])

    # -- in the child

    def _become_box(self, request: dict[str, Any], descriptors: list[int], parent: socket.socket, info: int) -> None:
        try:
            checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
            for path in request["groups"]:
                _write(path, "0")
            for name, value in request["rlimits"].items():
                _lower(getattr(resource, name), value)
            checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare (are user namespaces allowed?)")
            parent.send(b"ready")
            _, trees = received(parent)
            _become_root(request["base"] is not None)
            checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")  # a change of credentials cleared it
            self._mount(request, trees)
            self._execute(request, descriptors, info)
        except BaseException as error:
            parent.send(f"{type(error).__name__}: {error}".encode()[:MESSAGE])
        os._exit(1)

    def _mount(self, request: dict[str, Any], trees: list[int]) -> None:
        """The writable layer under its quota, and over the image."""
        stage = self.stage
        mount("none", "/", "none", MS_REC | MS_PRIVATE, "")
        options = f"size={request['disk']},nr_inodes={request['inodes']},mode=755"
        mount("none", stage, "tmpfs", MS_NOSUID | MS_NODEV, options)
        for name in ("upper", "work", "image", "root", "empty"):
            os.mkdir(f"{stage}/{name}", 0o755)
        if not request["image"]:
            return
        lower = request["image"]
        if trees:
            call = libc.syscall(MOVE_MOUNT, trees[0], b"", -100, f"{stage}/image".encode(), MOVE_MOUNT_F_EMPTY_PATH)
            checked(call, "move_mount")
            lower = f"{stage}/image"
        layers = f"lowerdir={lower},upperdir={stage}/upper,workdir={stage}/work,userxattr"
        mount("overlay", f"{stage}/root", "overlay", MS_NOSUID | MS_NODEV, layers)

    def _execute(self, request: dict[str, Any], descriptors: list[int], info: int) -> None:
        program = os.open(f"/proc/self/fd/{self.filter}", os.O_RDONLY)
        program, info = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, FREE) for descriptor in (program, info))
        root = "root" if request["image"] else "upper"
        command = [
            self.bwrap, *request["namespaces"], "--die-with-parent", "--new-session", "--as-pid-1",
            "--seccomp", str(program), "--info-fd", str(info), "--bind", f"{self.stage}/{root}", "/",
            *request["arguments"], "--", *request["command"],
        ]  # fmt: skip
        for kind in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(kind, signal.SIG_DFL)
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FREE) for descriptor in descriptors]
        for number, descriptor in enumerate(moved):
            os.dup2(descriptor, number)
        os.closerange(len(moved), FREE)  # whatever else is open is not for the box
        os.execve(self.bwrap, command, request["environment"])


def _become_root(several: bool) -> None:
    if several:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def main() -> None:
    """Serve the socket whose number is the first argument."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    gc.disable()  # a collection would touch, and so copy, the pages that a fork shares
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes the loop
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    with suppress(ConnectionError):  # the owner has gone, and did not read everything
        launcher = Launcher(channel)
        signal.signal(signal.SIGTERM, launcher.leave)
        launcher.serve()


if __name__ == "__main__":
    main()
