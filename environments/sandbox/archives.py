"""Entries as tar archives, and back: how files cross a box's border."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from palaestra.gym.sandbox import Entry

KINDS = {tarfile.REGTYPE: "file", tarfile.AREGTYPE: "file", tarfile.DIRTYPE: "directory", tarfile.SYMTYPE: "link"}
TYPES = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
OPAQUE = "palaestra.opaque"


def packed(entries: Mapping[str, Entry]) -> bytes:
    """A tar archive of entries, folders before what they hold. Raises ValueError for a kind that cannot be made."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, entry in sorted(entries.items()):
            if entry.kind not in TYPES:
                raise ValueError(f"{path}: cannot make an entry of kind {entry.kind!r}; known: {', '.join(TYPES)}")
            member = tarfile.TarInfo(path.lstrip("/"))
            member.type, member.mode, member.uid, member.gid = TYPES[entry.kind], entry.mode, entry.uid, entry.gid
            if entry.kind == "link":
                member.linkname = entry.content.decode(errors="surrogateescape")
            member.size = len(entry.content) if entry.kind == "file" else 0
            archive.addfile(member, io.BytesIO(entry.content))
    return out.getvalue()


def standing(place: Path) -> Entry:
    """What stands at a path of this machine; no link is followed. Raises OSError."""
    found = place.lstat()
    kind = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}.get(stat.S_IFMT(found.st_mode))
    content = place.read_bytes() if kind == "file" else os.fsencode(os.readlink(place)) if kind == "link" else b""
    return Entry(kind or "other", stat.S_IMODE(found.st_mode), content, found.st_uid, found.st_gid)


def changes(content: bytes, lowers: Iterable[Path] = ()) -> dict[str, Entry | None]:
    """The entries of an overlay's upper layer: None where it has a whiteout, and for what an opaque folder hides of
    `lowers`, the layers below."""
    found: dict[str, Entry | None] = {}
    hidden: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            whiteout = member.ischr() and (member.devmajor, member.devminor) == (0, 0)
            first = found.get(f"/{member.linkname}") if member.islnk() else None
            file = archive.extractfile(member) if member.isreg() else None
            found[f"/{member.name}"] = None if whiteout else first or entry(member, file.read() if file else b"")
            if OPAQUE in member.pax_headers:
                hidden += [f"/{path.relative_to(lower)}" for lower in lowers for path in _below(lower, member.name)]
    return {**dict.fromkeys(hidden), **found}


def _below(root: Path, name: str) -> Iterator[Path]:
    """All paths below a folder of an image; none where it is a link, or lies beyond one."""
    at = root
    for part in name.split("/"):
        at /= part
        if at.is_symlink():
            return
    yield from at.rglob("*")


def beyond(baseline: Mapping[str, Entry | None], found: Mapping[str, Entry | None]) -> dict[str, Entry | None]:
    """What is found and differs from the baseline; None for what only that has."""
    absent = object()
    new = {path: entry for path, entry in found.items() if baseline.get(path, absent) != entry}
    return {**dict.fromkeys(path for path in baseline if path not in found), **new}


def entry(member: tarfile.TarInfo, content: bytes) -> Entry:
    """What a member of an archive is; `content` of a regular file."""
    if member.issym():
        content = member.linkname.encode(errors="surrogateescape")
    return Entry(KINDS.get(member.type, "other"), member.mode, content, member.uid, member.gid)
