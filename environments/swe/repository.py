"""A repository to repair: its files, its tests, and what the tests must come to; rebuilt from a task's recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from palaestra.environments.swe.mutations import Edit, applied
from palaestra.environments.swe.packages import PACKAGES, Package, files
from palaestra.gym.registry import UsageError

HIDDEN = ("egg-info", "PKG-INFO", "SOURCES.txt", ".git", "__pycache__", ".github", ".gitignore")


class Repository(NamedTuple):
    """`files`: what the agent is given, the bug included; `tests`: what it is not given; `path`: what stands on
    PYTHONPATH; `arguments`: what pytest is given; `sources`: the paths that a repair may change."""

    files: Mapping[str, bytes]
    tests: Mapping[str, bytes]
    path: str
    arguments: tuple[str, ...]
    sources: tuple[str, ...]


def find(name: str) -> Package:
    """A package of the list. Raises UsageError."""
    for package in PACKAGES:
        if package.name == name:
            return package
    raise UsageError(f"there is no package {name!r}; the packages are: {', '.join(p.name for p in PACKAGES)}")


@functools.lru_cache(maxsize=8)
def whole(name: str) -> Repository:
    """A package's repository without any bug. Raises UsageError."""
    package = find(name)
    kept = {path: content for path, content in files(package).items() if not any(part in path for part in HIDDEN)}
    tests = {path: content for path, content in kept.items() if _below(path, package.tests) or _configures(path)}
    rest = {path: content for path, content in kept.items() if path not in tests}
    sources = tuple(path for path in rest if _below(path, (package.source,)) and path.endswith(".py"))
    return Repository(rest, tests, package.path, package.tests, sources)


def _below(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _configures(path: str) -> bool:
    """Files that decide how tests run: ours, never the agent's."""
    return path.rpartition("/")[2] in (
        "conftest.py",
        "pytest.ini",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        "setup.py",
    )


def repository(data: Mapping[str, Any]) -> Repository:
    """The repository of a task's `data`: a package with edits, or files of its own. Raises UsageError."""
    if "package" not in data:
        given, tests = ({path: text.encode() for path, text in data[part].items()} for part in ("files", "tests"))
        return Repository(given, tests, ".", tuple(tests), tuple(path for path in given if path.endswith(".py")))
    found = whole(data["package"])
    return found._replace(files={**found.files, **broken(found.files, data["edits"])})


def broken(clean: Mapping[str, bytes], edits: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The files that edits change, after them. An edit is an Edit's fields and its `file`."""
    by_file: dict[str, list[Edit]] = {}
    for edit in edits:
        by_file.setdefault(edit["file"], []).append(Edit(**{name: edit[name] for name in Edit._fields}))
    return {path: applied(clean[path].decode(), chosen).encode() for path, chosen in by_file.items()}
