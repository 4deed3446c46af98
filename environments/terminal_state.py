"""Trees of shell tasks: put into a box, and compared with what a box came to.

What is compared is data that left the box: databases and archives are opened in a process of their own, repositories
in a fresh box, never by a program of the box that is judged. That process is this file as a program: KIND, FORM and
SECONDS are its arguments, what its standard input holds it prints as JSON. Exported tasks carry a copy: it needs
nothing but the standard library.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palaestra.gym.sandbox import Entry
    from palaestra.tasks.terminal.puzzle import Node, Tree

Git = Callable[[str], Awaitable[str]]
"""Runs git with some arguments in the folder that holds the bare repository `judged`; what it prints."""

WORK = "/work"
LARGEST, MEMBERS, STEPS, ROWS, HEAP = 1 << 20, 1000, 10_000_000, 100_000, 64 << 20
"""Bytes and members of an archive that is opened, and what a database may cost: its makers may mean harm."""
OPEN_SECONDS, WAIT_SECONDS = 20, 90
"""How long a processor may take to open a database or an archive; after so long the machine is at fault."""
OPEN_LIMITS = {
    resource.RLIMIT_AS: 512 << 20, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
}  # fmt: skip
OPAQUE = ("sqlite", "archive")
PLAIN = re.compile("table: CREATE TABLE |index: CREATE (UNIQUE )?INDEX |index: $")
"""How the rows of a plain database's schema begin, as SQLite itself writes them."""


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
        found = opened(node.kind, node.parts["format"] if node.kind == "archive" else "", content)
    except ValueError as error:
        return f"is no {node.kind} ({error})"
    wanted = node.parts if node.kind == "sqlite" else node.parts["members"]
    return "" if found == _plain(wanted) else f"holds something else than it should ({node.kind})"


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with sorted rows; members as they are."""
    return {
        name: {**part, "rows": sorted(part["rows"], key=_order)} if isinstance(part, dict) else part
        for name, part in parts.items()
    }


def opened(kind: str, form: str, content: bytes) -> dict[str, Any]:
    """What a database, or an archive of a form, holds, read by a process of its own.

    Raises ValueError where that does not come to its end within OPEN_SECONDS of a processor, and RuntimeError where it
    had none for WAIT_SECONDS, or was killed: that is not what was to be opened.
    """
    if len(content) > LARGEST:
        raise ValueError(f"{len(content)} bytes; at most {LARGEST} are read")
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), kind, form, str(OPEN_SECONDS)]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=WAIT_SECONDS, env={}, cwd="/")
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"opening a {kind} had no {OPEN_SECONDS} s of a processor in {WAIT_SECONDS} s") from None
    if done.returncode == -signal.SIGXCPU:
        raise ValueError(f"it takes longer than {OPEN_SECONDS} s to open")
    if done.returncode == -signal.SIGKILL:
        raise RuntimeError(f"opening a {kind} was killed")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(said[:200] or f"opening it ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(kind: str, form: str, seconds: str) -> None:
    """Be the process that `opened` begins. A blob becomes an object: no text equals it."""
    for limit, most in OPEN_LIMITS.items():
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), WAIT_SECONDS))
    content = sys.stdin.buffer.read()
    found = tables(content) if kind == "sqlite" else members(form, content)
    json.dump(found, sys.stdout, default=lambda blob: {"blob": blob.hex()})


def tables(content: bytes) -> dict[str, Any]:
    """The tables of a database: columns with their types, rows sorted. Raises sqlite3.Error; ValueError where there is
    anything else, or too much."""
    if not content:
        return {}  # what SQLite makes of an empty file
    with sqlite3.connect(":memory:") as db:
        db.execute(f"PRAGMA hard_heap_limit = {HEAP}")
        db.deserialize(content)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
        db.set_progress_handler(lambda: 1, STEPS)  # ends what takes longer
        db.execute("PRAGMA trusted_schema = OFF")
        schema = db.execute("SELECT name, type, sql FROM sqlite_schema").fetchall()
        if not all(PLAIN.match(f"{kind}: {sql or ''}") for _, kind, sql in schema):
            raise ValueError("it has more than plain tables")
        if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            raise ValueError("its integrity check fails")
        found, left = {}, LARGEST
        for name in (name for name, kind, _ in schema if kind == "table"):
            quoted = '"' + name.replace('"', '""') + '"'
            columns = [[column[1], column[2]] for column in db.execute(f"PRAGMA table_info({quoted})")]
            rows = _rows(db, quoted, left)
            left -= len(repr(rows))
            found[name] = {"columns": columns, "rows": sorted(rows, key=_order)}
        return found


def _order(row: list[Any]) -> list[tuple[int, Any]]:
    """Where a row stands among others, as SQLite orders values: none, numbers, texts, blobs."""
    return [
        (0, 0)
        if value is None
        else ((str, bytes).index(type(value)) + 2, value)
        if isinstance(value, str | bytes)
        else (1, value)
        for value in row
    ]


def _rows(db: sqlite3.Connection, table: str, left: int) -> list[list[Any]]:
    found: list[list[Any]] = []
    for row in db.execute(f"SELECT * FROM {table} LIMIT {ROWS}"):
        found.append(list(row))
        left -= len(repr(row))
        if left < 0:
            raise ValueError(f"its tables have more than {LARGEST} bytes")
    return found


def members(form: str, content: bytes) -> dict[str, str]:
    """The files of an archive by name. Raises ValueError for what is no plain file, or too much."""
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            infos = packed.infolist()
            if len(infos) > MEMBERS or sum(info.file_size for info in infos) > LARGEST:
                raise ValueError(f"more than {MEMBERS} members, or {LARGEST} bytes")
            return {info.filename: packed.read(info).decode() for info in infos}
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(_decompressed(form, content)), mode="r:") as archive:
        for member in archive:
            plain = member.isreg() and not member.issparse() and 0 <= member.size <= LARGEST
            file = archive.extractfile(member) if plain else None
            if file is None or len(found) == MEMBERS:
                raise ValueError(f"{member.name} is no file, or one too many")
            found[member.name] = file.read().decode()
    return found


def _decompressed(form: str, content: bytes) -> bytes:
    """The tar archive within. Raises ValueError for more than LARGEST bytes."""
    if form == "tar.gz":
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            found = packed.read(LARGEST + 1)
    elif form == "tar.xz":
        with lzma.LZMAFile(io.BytesIO(content)) as packed_better:
            found = packed_better.read(LARGEST + 1)
    else:
        found = content
    if len(found) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return found


GIT = (
    "git --no-replace-objects -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.attributesFile=/dev/null "
    "-c core.commitGraph=false"
)
KEPT = ("HEAD", "objects", "refs", "packed-refs")
CONFIG = b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n"
"""What is taken of a repository, and how it then is configured."""


def taken(found: Mapping[str, Entry], place: str) -> dict[str, Entry]:
    """What is looked at of the repository at `place`, by paths below it: files and folders, nothing that configures."""
    below = {path.removeprefix(f"{place}/"): entry for path, entry in found.items() if path.startswith(f"{place}/")}
    kept = {path: entry for path, entry in below.items() if path.split("/")[0] in KEPT}
    return {path: entry for path, entry in kept.items() if entry.kind in ("file", "directory")}


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
    ref = shlex.quote(f"refs/heads/{name}")
    subjects = (await git(f"log --topo-order --format=%s {ref}")).splitlines()
    if sorted(subjects) != sorted(wanted["subjects"]) or subjects[:1] != wanted["subjects"][:1]:
        return ["has other commits"]
    listed = (await git(f"ls-tree -r -z --name-only {ref}")).rstrip("\0").split("\0")
    if sorted(listed) != sorted(wanted["tree"]):
        return ["has other files"]
    parents = (await git(f"log -n 1 --format=%P {ref}")).split()
    if len(parents) != wanted.get("parents", len(parents)):
        return [f"ends with a commit of {len(parents)} parents"]
    if "merged" in wanted and await git(f"rev-list {shlex.quote('refs/heads/' + wanted['merged'])} --not {ref}"):
        return [f"lacks commits of {wanted['merged']}"]
    found = {path: await git(f"cat-file blob {shlex.quote(f'refs/heads/{name}:{path}')}") for path in wanted["tree"]}
    return [f"has other content in {path}" for path, text in wanted["tree"].items() if found[path] != text]


def called(found: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a process has these arguments, all of them; the folder of its program aside."""
    return [found[0].rpartition("/")[2], *found[1:]] == list(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
