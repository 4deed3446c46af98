"""First steps: one command, or as many as the level says, on a folder with a few files."""

from __future__ import annotations

import random
from collections.abc import Callable

from palaestra.tasks.terminal.puzzle import Puzzle, Tree, file, folder
from palaestra.tasks.words import PEOPLE

Step = Callable[[Tree, str, random.Random], tuple[str, str]]
"""Changes the tree; returns the sentence that asks for it and a command that does it."""


def first_steps(level: int, r: random.Random) -> Puzzle:
    """`level` small changes, each to another file. The files bear capitalised names, which a small policy copies."""
    words = r.sample(PEOPLE, level + 2)
    before: Tree = {f"{word}.txt": file(f"{r.randint(10, 99)}\n") for word in words}
    after = dict(before)
    asked, commands = [], []
    for word in r.sample(words, level):
        sentence, command = r.choice(STEPS)(after, f"{word}.txt", r)
        asked.append(sentence)
        commands.append(command)
    return Puzzle(" ".join(asked), before, after, "\n".join(commands))


def _write(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    number = r.randint(100, 999)
    tree[path] = tree[path].model_copy(update={"text": f"{number}\n"})
    return f"Write {number} to {path}.", f"echo {number} > {path}"


def _append(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    number = r.randint(100, 999)
    tree[path] = tree[path].model_copy(update={"text": tree[path].text + f"{number}\n"})
    return f"Append {number} to {path}.", f"echo {number} >> {path}"


def _delete(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    del tree[path]
    return f"Delete {path}.", f"rm {path}"


def _rename(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    new = f"new-{path}"
    tree[new] = tree.pop(path)
    return f"Rename {path} to {new}.", f"mv {path} {new}"


def _copy(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    new = f"copy-{path}"
    tree[new] = tree[path]
    return f"Copy {path} to {new}.", f"cp {path} {new}"


def _move(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    place = path.removesuffix(".txt")
    tree[place] = folder()
    tree[f"{place}/{path}"] = tree.pop(path)
    return f"Move {path} into a new folder {place}.", f"mkdir {place}; mv {path} {place}"


def _protect(tree: Tree, path: str, r: random.Random) -> tuple[str, str]:
    mode = r.choice((0o600, 0o640, 0o444, 0o755))
    tree[path] = tree[path].model_copy(update={"mode": mode})
    return f"Give {path} the mode {mode:o}.", f"chmod {mode:o} {path}"


STEPS: tuple[Step, ...] = (_write, _append, _delete, _rename, _copy, _move, _protect)
