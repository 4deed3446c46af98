"""Names and contents that trees are filled with."""

from __future__ import annotations

import random

from palaestra.tasks.terminal.puzzle import Tree, file, lines, with_folders
from palaestra.tasks.words import PEOPLE, PLACES, THINGS

ENDINGS = ("txt", "md", "log", "csv", "conf", "dat")
FOLDERS = ("src", "docs", "data", "logs", "old", "backup", "notes", "lib", "tests", "tmp", "in", "out")


def names(r: random.Random, count: int) -> list[str]:
    """Distinct words for file names, without endings."""
    return [word.lower().replace(" ", "-") for word in r.sample(sorted({*PEOPLE, *PLACES, *THINGS}), count)]


def sentence(r: random.Random) -> str:
    """A short line of text."""
    return f"{r.choice(PEOPLE)} has {r.randint(2, 99)} {r.choice(THINGS)} in {r.choice(PLACES)}"


def text(r: random.Random, count: int) -> str:
    """So many lines of it."""
    return lines(sentence(r) for _ in range(count))


def tree(r: random.Random, count: int, depth: int = 2, endings: tuple[str, ...] = ENDINGS) -> Tree:
    """A tree of so many files, in folders at most `depth` deep."""
    found = {}
    for name in names(r, count):
        above = r.sample(FOLDERS, r.randint(0, depth))
        found["/".join([*above, f"{name}.{r.choice(endings)}"])] = file(text(r, r.randint(1, 5)))
    return with_folders(found)


def files_of(tree: Tree) -> list[str]:
    """The paths of its files."""
    return [path for path, node in tree.items() if node.kind == "file"]
