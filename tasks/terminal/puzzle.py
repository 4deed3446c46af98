"""What a shell task is made of: a tree before, the tree wanted after, and what else must then be true.

Trees are of the folder /work: relative path -> Node, folders included. The wanted tree is computed here in Python,
never by the gold script, so that the two check each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from palaestra.gym.types import Record


class Node(Record):
    """What stands at a path. `text`: a file's content, a link's target. `parts` describes what has no one right
    content: the tables of a database, the members of an archive, the history of a repository. In a wanted tree `any` is
    some file, and `maybe` a file or nothing."""

    kind: Literal["file", "directory", "link", "sqlite", "archive", "git", "any", "maybe"] = "file"
    mode: int = 0o644
    text: str = ""
    parts: Mapping[str, Any] = {}


Tree = dict[str, Node]


class Puzzle(NamedTuple):
    """A task. `script` is a solution; `setup` runs in /work once the tree stands there, before the policy; `checks` are
    conditions on the live box, as environments/terminal.py knows them."""

    prompt: str
    before: Tree
    after: Tree
    script: str
    setup: str = ""
    checks: tuple[dict[str, Any], ...] = ()


Template = Callable[[int, random.Random], Puzzle]
"""Makes a puzzle of a level, 1 and up."""


def file(text: str, mode: int = 0o644) -> Node:
    """A file."""
    return Node(text=text, mode=mode)


def folder(mode: int = 0o755) -> Node:
    """A folder."""
    return Node(kind="directory", mode=mode)


def link(target: str) -> Node:
    """A symbolic link."""
    return Node(kind="link", mode=0o777, text=target)


ANY, MAYBE = Node(kind="any"), Node(kind="maybe")


def with_folders(tree: Mapping[str, Node]) -> Tree:
    """The tree, and the folders above its paths."""
    out: Tree = {}
    for path, node in sorted(tree.items()):
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            out.setdefault("/".join(parts[:depth]), folder())
        out[path] = node
    return dict(sorted(out.items()))


def without(tree: Mapping[str, Node], paths: Iterable[str]) -> Tree:
    """The tree less some paths."""
    gone = set(paths)
    return {path: node for path, node in tree.items() if path not in gone}


def lines(texts: Iterable[object]) -> str:
    """A file's content of one line each."""
    return "".join(f"{text}\n" for text in texts)
