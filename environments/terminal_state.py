"""Trees of shell tasks: put into a box, and compared with what a box came to.

What is compared is data that left the box: databases, archives and repositories are opened here or in a fresh box,
never by a program of the box that is judged. Exported tasks carry a copy of this file: it needs nothing but the
standard library.
"""

from __future__ import annotations

import io
import shlex
import sqlite3
import tarfile
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palaestra.gym.sandbox import Entry
    from palaestra.tasks.terminal.puzzle import Node, Tree

Git = Callable[[str], Awaitable[str]]
"""Runs git with some arguments in the folder that holds the bare repository `judged`; what it prints."""

WORK = "/work"
TEXTS = 1 << 20
"""Bytes that are read of an archive's member."""
OPAQUE = ("sqlite", "archive")


def content_of(node: Node) -> bytes:
    """The bytes of a file, database or archive."""
    make = {"sqlite": _database, "archive": _archive}.get(node.kind)
    return make(node.parts) if make else node.text.encode()


def _database(tables: Mapping[str, Any]) -> bytes:
    with sqlite3.connect(":memory:") as db:
        for name, table in tables.items():
            columns = ", ".join(f"{column} {kind}" for column, kind in table["columns"])
            db.execute(f"CREATE TABLE {name} ({columns})")
            marks = ", ".join("?" for _ in table["columns"])
            db.executemany(f"INSERT INTO {name} VALUES ({marks})", table["rows"])
        db.commit()
        content: bytes = db.serialize()
        return content


def _archive(parts: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    if parts["format"] == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            for name, text in parts["members"].items():
                packed.writestr(zipfile.ZipInfo(name), text)
        return out.getvalue()
    compression = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[parts["format"]]
    with tarfile.open(fileobj=out, mode=compression) as archive:  # type: ignore[call-overload]
        for name, text in parts["members"].items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def applied(tree: Mapping[str, Entry], changes: Mapping[str, Entry | None]) -> dict[str, Entry]:
    """A tree after changes; what lay below a removed or replaced folder is gone too."""
    gone = [path for path, entry in changes.items() if entry is None or entry.kind != "directory"]
    kept = {path: entry for path, entry in tree.items() if not any(path.startswith(f"{above}/") for above in gone)}
    return {path: entry for path, entry in {**kept, **changes}.items() if entry is not None}


def differences(wanted: Tree, found: Mapping[str, Entry]) -> list[str]:
    """What is wrong below /work, a line each; nothing where all is as wanted. Repositories are left out."""
    problems = []
    skipped = [f"{WORK}/{path}" for path, node in wanted.items() if node.kind == "git"]
    here = {
        path: entry
        for path, entry in found.items()
        if path.startswith(f"{WORK}/") and not any(path == top or path.startswith(f"{top}/") for top in skipped)
    }
    nodes = {f"{WORK}/{path}": node for path, node in wanted.items() if node.kind != "git"}
    for path in sorted(here.keys() | nodes.keys()):
        problem = _problem(nodes.get(path), here.get(path))
        problems += [f"{path}: {problem}"] if problem else []
    return problems


def _problem(node: Node | None, entry: Entry | None) -> str:
    if node is None:
        return "should not be there"
    if entry is None:
        return "" if node.kind == "maybe" else "is missing"
    if node.kind in ("any", "maybe"):
        return "" if entry.kind == "file" else f"is a {entry.kind}, not a file"
    kind = "file" if node.kind in OPAQUE else node.kind
    if entry.kind != kind:
        return f"is a {entry.kind}, not a {kind}"
    if kind != "link" and entry.mode != node.mode:
        return f"has mode {entry.mode:o}, not {node.mode:o}"
    if node.kind in OPAQUE:
        return _unlike(node, entry.content)
    return "" if entry.content == node.text.encode() else "has other content"


def _unlike(node: Node, content: bytes) -> str:
    try:
        found = tables(content) if node.kind == "sqlite" else members(node.parts["format"], content)
    except (sqlite3.Error, tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        return f"is no {node.kind} ({error})"
    wanted = node.parts if node.kind == "sqlite" else node.parts["members"]
    return "" if found == _plain(wanted) else f"holds something else than it should ({node.kind})"


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with sorted rows; members as they are."""
    return {
        name: {**part, "rows": sorted(part["rows"])} if isinstance(part, dict) else part for name, part in parts.items()
    }


def tables(content: bytes) -> dict[str, Any]:
    """The tables of a database: columns with their types, rows sorted. Raises sqlite3.Error, ValueError."""
    if not content:
        return {}  # what SQLite makes of an empty file
    with sqlite3.connect(":memory:") as db:
        db.deserialize(content)
        db.execute("PRAGMA trusted_schema = OFF")
        if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            raise ValueError("its integrity check fails")
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")]
        found = {}
        for name in names:
            quoted = '"' + name.replace('"', '""') + '"'
            columns = [[column[1], column[2]] for column in db.execute(f"PRAGMA table_info({quoted})")]
            rows = [list(row) for row in db.execute(f"SELECT * FROM {quoted} LIMIT 100000")]
            found[name] = {"columns": columns, "rows": sorted(rows)}
        return found


def members(form: str, content: bytes) -> dict[str, str]:
    """The files of an archive by name. Raises ValueError for what is no plain file."""
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            return {info.filename: packed.open(info).read(TEXTS).decode() for info in packed.infolist()}
    mode = {"tar": "r:", "tar.gz": "r:gz", "tar.xz": "r:xz"}[form]
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as archive:  # type: ignore[call-overload]
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise ValueError(f"{member.name} is no file")
            found[member.name] = file.read(TEXTS).decode()
    return found


GIT = "git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.attributesFile=/dev/null"
KEPT = ("HEAD", "objects", "refs", "packed-refs")
"""What is taken of a repository: nothing that configures."""


def taken(found: Mapping[str, Entry], place: str) -> dict[str, Entry]:
    """What is looked at of the repository at `place`, by paths below it: nothing that configures."""
    below = {path.removeprefix(f"{place}/"): entry for path, entry in found.items() if path.startswith(f"{place}/")}
    return {path: entry for path, entry in below.items() if path.split("/")[0] in KEPT}


async def repository(git: Git, node: Node, place: str) -> list[str]:
    """What is wrong with the repository that was at `place`."""
    head = (await git("symbolic-ref --short HEAD")).strip()
    problems = [] if head == node.parts["head"] else [f"{place}: {head!r} is checked out, not {node.parts['head']}"]
    branches = (await git("for-each-ref --format='%(refname:short)' refs/heads")).split()
    if sorted(branches) != sorted(node.parts["branches"]):
        return [*problems, f"{place}: the branches are {', '.join(sorted(branches))}"]
    for name, wanted in node.parts["branches"].items():
        problems += [f"{place}: branch {name} {problem}" for problem in await _branch(git, name, wanted)]
    return problems


async def _branch(git: Git, name: str, wanted: Mapping[str, Any]) -> list[str]:
    subjects = (await git(f"log --topo-order --format=%s {shlex.quote(name)}")).splitlines()
    if sorted(subjects) != sorted(wanted["subjects"]) or subjects[:1] != wanted["subjects"][:1]:
        return ["has other commits"]
    listed = (await git(f"ls-tree -r -z --name-only {shlex.quote(name)}")).rstrip("\0").split("\0")
    if sorted(listed) != sorted(wanted["tree"]):
        return ["has other files"]
    found = {path: await git(f"cat-file blob {shlex.quote(f'{name}:{path}')}") for path in wanted["tree"]}
    return [f"has other content in {path}" for path, text in wanted["tree"].items() if found[path] != text]
