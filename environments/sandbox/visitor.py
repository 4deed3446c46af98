"""Visits to a box's files and services: runs in a process forked from the launcher, as the box's own root.

It joins the box's namespaces, and for the writable layer makes that its root, so that no link of the box leads anywhere
else. Nothing but the standard library: launcher.py imports it by its path.
"""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401 (connect() wants it, and in a box it cannot be found any more)
import fcntl
import io
import os
import secrets
import shutil
import signal
import socket
import stat
import struct
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
CAPABILITY_VERSION, KEPT = 0x20080522, 0b1011
"""Of capset(2); the capabilities of a visitor: CHOWN, DAC_OVERRIDE, FOWNER."""
SIOCSIFFLAGS = 0x8914
OPAQUE = ("user.overlay.opaque", "trusted.overlay.opaque")
SECONDS, ANSWER, CHUNK, LOOKS = 60, 1 << 20, 1 << 16, 20

libc = ctypes.CDLL(None, use_errno=True)


class TooMuch(Exception):
    """More is there than is collected."""


def answer(request: dict[str, Any], target: int, peer: socket.socket) -> None:
    """Do what `request["visit"]` says in the box of the process handle `target`, speak with the owner, and end.

    read: the content of the file `path`. put: a tar archive that the owner sends is unpacked. diff: a tar archive of
    the writable layer, the folder `layer`. ask: what a service answers at `port` to what the owner sends. silence: the
    loopback is taken down. `enter` says which namespaces of the process to join first. The last line of what is said is
    `ok`, or `error` and why.
    """
    signal.alarm(SECONDS)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # an owner that has gone ends it
    stream = peer.makefile("rwb")
    try:
        if request["enter"]:
            enter(target, request["enter"])
        if request["visit"] == "diff":
            os.chroot(request["layer"])
            os.chdir("/")
            collect(stream, request["limit"])
        elif request["visit"] == "silence":
            silence()
        else:
            stream.write(visit(request, stream))
        last = "ok"
    except BaseException as error:
        last = "error " + " ".join(f"{type(error).__name__}: {error}".split())
    while stream.read(CHUNK):
        pass  # what is left unread would be lost with the answer
    stream.write(f"\n{last}".encode(errors="replace"))
    stream.flush()


def visit(request: dict[str, Any], stream: io.BufferedIOBase) -> bytes:
    """Do what links of the box, or its services, could lead astray: with no more rights than its own root has."""
    _drop_capabilities()
    if request["visit"] == "read":
        return read(request["path"], request["limit"])
    if request["visit"] == "put":
        put(stream)
        return b""
    return ask(request["port"], stream.read(), request["timeout"])


def enter(target: int, namespaces: int) -> None:
    """Join namespaces of a process, as the root of its user namespace. Raises OSError."""
    if os.geteuid() == 0:
        os.setgroups([])
    _checked(libc.setns(target, namespaces))
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def silence() -> None:
    """Take the loopback interface down. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", 0))


def _drop_capabilities() -> None:
    header, sets = struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", KEPT, KEPT, 0, 0, 0, 0)
    _checked(libc.capset(header, sets))


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read(path: str, limit: int) -> bytes:
    """The content of a regular file. Raises OSError for anything else, and for one of more than `limit` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is no regular file")
    if found.st_size > limit:
        raise OSError(f"{path} has {found.st_size} bytes; the limit is {limit}")
    return _exactly(descriptor, found.st_size or limit)


def _exactly(descriptor: int, limit: int) -> bytes:
    """At most so many bytes of a file, whatever it grows to meanwhile. Closes it."""
    content = bytearray()
    while len(content) < limit and (part := os.read(descriptor, min(CHUNK, limit - len(content)))):
        content += part
    os.close(descriptor)
    return bytes(content)


def put(stream: io.BufferedIOBase) -> None:
    """Unpack a tar archive below /, owners and modes included. Each entry is made beside its place and moved there, and
    what stands in its way gives way, whatever it is; above a place, links to folders are followed."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = "/" + member.name
            folder(os.path.dirname(path), True)
            if member.isdir():
                folder(path, False)
                os.chown(path, member.uid, member.gid)
                os.chmod(path, member.mode)
                continue
            beside = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}")
            try:
                _make(archive, member, beside)
                _moved(beside, path)
            except BaseException:
                if os.path.lexists(beside):
                    os.unlink(beside)
                raise


def _moved(source: str, path: str) -> None:
    try:
        os.rename(source, path)
    except IsADirectoryError:
        clear(path)
        os.rename(source, path)


def folder(path: str, followed: bool) -> None:
    """Have a folder at a path; `followed`: a link to one will do."""
    if os.path.isdir(path) and (followed or not os.path.islink(path)):
        return
    folder(os.path.dirname(path), True)
    clear(path)
    os.mkdir(path)


def clear(path: str) -> None:
    """Remove what stands at a path, if anything does, whatever it is; no link is followed. Raises OSError."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _make(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    if member.issym():
        os.symlink(member.linkname, path)
        os.lchown(path, member.uid, member.gid)
        return
    source = archive.extractfile(member)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as out:
        while source is not None and (part := source.read(CHUNK)):
            out.write(part)
        out.flush()
        os.fchown(descriptor, member.uid, member.gid)
        os.fchmod(descriptor, member.mode)


def collect(stream: io.BufferedIOBase, limit: int) -> None:
    """Write everything below / as a tar archive. A whiteout is a character device 0:0; an opaque folder carries a pax
    header. What vanishes meanwhile is left out. Raises TooMuch where the files have more than `limit` bytes."""
    left = limit
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path in walk("/"):
            found = _taken(archive, path, left)
            if found is not None:
                left -= len(found[1])
                archive.addfile(found[0], io.BytesIO(found[1]))


def _taken(archive: tarfile.TarFile, path: str, left: int) -> tuple[tarfile.TarInfo, bytes] | None:
    """What stands at a path, and its content; None where nothing does. What differs at each look is called a fifo."""
    for _ in range(LOOKS):
        try:
            member = archive.gettarinfo(path, path.lstrip("/"))
            if member is None:
                break  # a socket
            content = _content(path, left) if member.isreg() else b""
        except FileNotFoundError:
            return None
        except OSError:
            continue  # it has become something else between two calls
        member.uname = member.gname = ""
        if not member.islnk():
            member.size = len(content)
        if member.isdir() and _opaque(path):
            member.pax_headers = {"palaestra.opaque": "y"}
        return member, content
    member = tarfile.TarInfo(path.lstrip("/"))
    member.type = tarfile.FIFOTYPE
    return member, b""


def _content(path: str, left: int) -> bytes:
    """A file of the layer, which must not have become anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
    size = os.fstat(descriptor).st_size
    if size > left:
        raise TooMuch(f"the changed files have more bytes than the limit ({path}: {size} more)")
    return _exactly(descriptor, size)


def walk(top: str) -> Iterator[str]:
    """All paths below a folder, links not followed, folders before what they hold."""
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted(folders + files):
            yield os.path.join(folder, name)


def _opaque(path: str) -> bool:
    for name in OPAQUE:
        with suppress(OSError):
            if os.getxattr(path, name) == b"y":
                return True
    return False


def ask(port: int, request: bytes, timeout: float) -> bytes:
    """What a service on the loopback answers until it closes. Raises OSError, TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    with socket.create_connection(("127.0.0.1", port), timeout) as peer:
        peer.settimeout(max(0.001, end - time.monotonic()))
        peer.sendall(request)
        found = bytearray()
        while (left := end - time.monotonic()) > 0:
            peer.settimeout(left)
            part = peer.recv(CHUNK)
            found += part
            if len(found) > ANSWER:
                raise OSError(f"an answer of more than {ANSWER} bytes")
            if not part:
                return bytes(found)
        raise TimeoutError(f"the answer has not ended after {timeout:g} s")
