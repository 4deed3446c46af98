"""What crosses from the box of a Harbor task's agent to that of a separate verifier: its data, and no way out of it."""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from palaestra.environments.harbor_task import Artifact
from palaestra.environments.sandbox import images
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, Entry

ALWAYS = "/logs/artifacts"
VERIFIERS = ("/tests", "/logs/verifier")
"""Nothing crosses into these."""
KINDS = ("file", "directory", "link")
REMOVE_SECONDS = 60.0
HOPS = 40
"""Links that may follow one another."""
Ways = Mapping[str, str]
"""From where in the agent's box to where in the verifier's: absolute paths, as they are without links."""


def ways(artifacts: Iterable[Artifact], root: Path, workdir: str) -> Ways:
    """ALWAYS, and a task's artifacts, which keep their places (as in Harbor) unless their destination is absolute.
    `root`: of the agent's image, whose links may lead to a source. Raises UsageError for a whole file system."""
    found = {ALWAYS: ALWAYS}
    for one in artifacts:
        source = _absolute(one.source, workdir)
        to = _absolute(one.destination, "/") if one.destination.startswith("/") else source
        if "/" in (source, to):
            raise UsageError(f"the artifact {one.source!r} is a whole file system; name folders of it")
        place = images.inside(root, posixpath.dirname(source)) / posixpath.basename(source)
        found[f"/{place.relative_to(root)}"] = to
    return found


def after(tree: Mapping[str, Entry], changes: Mapping[str, Entry | None]) -> dict[str, Entry]:
    """A tree after changes; what lay below a removed or replaced folder is gone too. However many there are, a policy
    may have made them, each is looked at once."""
    gone = {path for path, entry in changes.items() if entry is None or entry.kind != "directory"}
    kept = {path: entry for path, entry in tree.items() if gone.isdisjoint(_above(path))}
    return {path: entry for path, entry in {**kept, **changes}.items() if entry is not None}


def crossing(found: Mapping[str, Entry], ways: Ways) -> dict[str, Entry]:
    """What crosses of what the agent left, by its place in the verifier's box: files, folders, and the links that lead,
    over other such links, to something that crosses as well."""
    placed: dict[str, Entry] = {}
    for source, destination in ways.items():
        for path, entry in found.items():
            if entry.kind in KINDS and _below(path, source):
                placed.setdefault(destination + path.removeprefix(source), entry)
    placed = {path: entry for path, entry in placed.items() if not any(_below(path, top) for top in VERIFIERS)}
    links = _Links(placed)
    return {path: entry for path, entry in placed.items() if entry.kind != "link" or links.end(path)}


async def cross(box: Box, entries: Mapping[str, Entry], stale: Iterable[str]) -> None:
    """Put what crosses into the verifier's box; what stands at the `stale` paths goes whole, so that what the agent
    removed is gone there, too. Raises OSError."""
    await box.exec(f"rm -rf -- {shlex.join(stale)}", REMOVE_SECONDS)  # a box in which nobody has worked
    await emptied(box, ALWAYS)
    await box.put(entries)


async def emptied(box: Box, *folders: str) -> None:
    """Make folders anew, empty; no program of the box takes part. Raises OSError."""
    await box.put({folder: Entry("file", 0o600) for folder in folders})
    await box.put({folder: Entry("directory", 0o755) for folder in folders})


class _Links:
    """Where links lead, by names alone, among entries and the folders above them. Each is followed once."""

    def __init__(self, placed: Mapping[str, Entry]) -> None:
        self._placed = placed
        self._known = {"/", *placed, *(above for path in placed for above in _above(path))}
        self._ends: dict[str, str] = {}

    def end(self, path: str, hops: int = HOPS) -> str:
        """Where a link leads; empty where that, or anything on the way, is none of these, or too many links follow."""
        if path not in self._ends and hops:
            self._ends[path] = ""  # what leads back to itself leads nowhere
            self._ends[path] = self._followed(path, hops)
        return self._ends.get(path, "")

    def _followed(self, path: str, hops: int) -> str:
        target = os.fsdecode(self._placed[path].content)
        at = "/" if target.startswith("/") else posixpath.dirname(path)
        for part in target.split("/"):
            at = posixpath.normpath(posixpath.join(at, part))
            if at in self._placed and self._placed[at].kind == "link":
                at = self.end(at, hops - 1)
            if at not in self._known:
                return ""
        return at if at in self._placed else ""


def _absolute(path: str, start: str) -> str:
    return "/" + posixpath.normpath(posixpath.join("/", start, path)).lstrip("/")


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _above(path: str) -> Iterator[str]:
    return map(str, PurePosixPath(path).parents)
