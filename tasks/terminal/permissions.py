"""Modes of files and folders."""

from __future__ import annotations

import random

from palaestra.tasks.terminal.content import files_of, tree
from palaestra.tasks.terminal.puzzle import Node, Puzzle, Tree

MODES = (0o644, 0o600, 0o664, 0o666, 0o755, 0o777, 0o622, 0o640)


def _scattered(level: int, r: random.Random) -> Tree:
    """A tree with modes of all kinds."""
    found = tree(r, 3 + 3 * level, depth=level)
    return {
        path: _with(node, r.choice(MODES) if node.kind == "file" else r.choice((0o755, 0o775, 0o777)))
        for path, node in found.items()
    }


def _with(node: Node, mode: int) -> Node:
    return node.model_copy(update={"mode": mode})


def mode_by_ending(level: int, r: random.Random) -> Puzzle:
    """Files of an ending get a mode; from level 2 folders get another."""
    before = _scattered(level, r)
    ending = r.choice(files_of(before)).rpartition(".")[2]
    mode, inner = r.choice((0o600, 0o640, 0o444, 0o755)), r.choice((0o700, 0o750))
    after = {p: _with(n, mode) if n.kind == "file" and p.endswith(f".{ending}") else n for p, n in before.items()}
    prompt = f"Give every file below /work whose name ends in .{ending} the mode {mode:o}."
    script = f"find . -type f -name '*.{ending}' -exec chmod {mode:o} {{}} +"
    if level > 1:
        after = {p: _with(n, inner) if n.kind == "directory" else n for p, n in after.items()}
        prompt += f" Give every folder below /work (not /work itself) the mode {inner:o}."
        script += f"; find . -mindepth 1 -type d -exec chmod {inner:o} {{}} +"
    return Puzzle(prompt, before, after, script)


def close_to_others(level: int, r: random.Random) -> Puzzle:
    """Nobody but the owner's group may write; from level 2 set-group-id marks shared folders."""
    before = _scattered(level, r)
    after = {p: _with(n, n.mode & ~0o002) for p, n in before.items()}
    prompt = "Take from others the permission to write to anything below /work. Change no other permission."
    script = "find . -mindepth 1 ! -type l -exec chmod o-w {} +"
    if level > 1:
        after = {
            p: _with(n, n.mode | 0o2000) if n.kind == "directory" and n.mode & 0o020 else n for p, n in after.items()
        }
        prompt += " Then set the set-group-id bit of each folder below /work that its group may write to."
        script += "; find . -mindepth 1 -type d -perm -020 -exec chmod g+s {} +"
    return Puzzle(prompt, before, after, script)


def runnable_scripts(level: int, r: random.Random) -> Puzzle:
    """Files that begin with #! become executable for whom they are readable; others lose it."""
    before = _scattered(level, r)
    for path in r.sample(files_of(before), 1 + level):
        before[path] = before[path].model_copy(update={"text": f"#!/bin/sh\n{before[path].text}"})
    after = {p: _with(n, _runnable(n)) if n.kind == "file" else n for p, n in before.items()}
    prompt = "Below /work, let exactly those files be executable that begin with #!, for exactly those (owner, group, others) who may read them."
    script = (
        "find . -type f -print0 | while IFS= read -r -d '' f; do chmod a-x \"$f\"; "
        'if [ "$(head -c 2 "$f")" = "#!" ]; then m=$(stat -c %a "$f"); chmod $(printf %o $((0$m | (0$m & 0444) >> 2))) "$f"; fi; done'
    )
    return Puzzle(prompt, before, after, script)


def _runnable(node: Node) -> int:
    plain = node.mode & ~0o111
    return plain | (plain & 0o444) >> 2 if node.text.startswith("#!") else plain


TEMPLATES = (mode_by_ending, close_to_others, runnable_scripts)
