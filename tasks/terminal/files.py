"""Trees of files: renaming, sorting, removing what is double or empty, flattening, links."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict

from palaestra.tasks.terminal.content import ENDINGS, FOLDERS, files_of, names, text, tree
from palaestra.tasks.terminal.puzzle import Puzzle, Tree, file, folder, link, with_folders, without

ODD = ("two words", "-dash", "tab\there", "quote'd", "star*", "ümlaut", "semi;colon", "dollar$x")
"""Names that careless scripts break on; from level 2."""


def rename_endings(level: int, r: random.Random) -> Puzzle:
    """Every file of one ending gets another, at any depth."""
    old, new = r.sample(ENDINGS, 2)
    before = tree(r, 3 + 3 * level, depth=level)
    if level > 1:
        before |= {f"{name}.{old}": file(text(r, 1)) for name in r.sample(ODD, level)}
    before = without(
        before, [p for p in files_of(before) if p.endswith(f".{new}") and f"{p[: -len(new)]}{old}" in before]
    )
    before = with_folders(before)
    after = {_renamed(path, old, new) if node.kind == "file" else path: node for path, node in before.items()}
    script = f"find . -type f -name '*.{old}' -print0 | while IFS= read -r -d '' f; do mv -- \"$f\" \"${{f%.{old}}}.{new}\"; done"
    return Puzzle(
        f"Rename every file below /work whose name ends in .{old} so that it ends in .{new} instead.",
        before,
        after,
        script,
    )


def _renamed(path: str, old: str, new: str) -> str:
    return f"{path[: -len(old)]}{new}" if path.endswith(f".{old}") else path


def sort_by_ending(level: int, r: random.Random) -> Puzzle:
    """Files of one folder go into folders named after their endings."""
    before: Tree = {f"{name}.{r.choice(ENDINGS)}": file(text(r, 1)) for name in names(r, 3 + 2 * level)}
    if level > 1:
        before |= {f"{name}.{r.choice(ENDINGS)}": file(text(r, 1)) for name in r.sample(ODD, level)}
    kept = "README"
    before[kept] = file(text(r, 1))
    after: Tree = {kept: before[kept]}
    for path in without(before, [kept]):
        after[f"{path.rpartition('.')[2]}/{path}"] = before[path]
    script = 'for f in *.*; do mkdir -p "${f##*.}"; mv -- "./$f" "${f##*.}/"; done'
    prompt = "Move each file in /work that has an ending into a folder named after the ending (note.txt into txt). README stays."
    return Puzzle(prompt, before, with_folders(after), script)


def remove_doubles(level: int, r: random.Random) -> Puzzle:
    """Of files with the same content the first by path stays; from level 3 the others become links to it."""
    before = tree(r, 3 + 2 * level, depth=min(level, 2))
    originals = files_of(before)
    for number, name in enumerate(names(r, 2 * level)):
        before[f"{r.choice(FOLDERS)}/z{number}-{name}.txt"] = before[r.choice(originals)]
    before = with_folders(before)
    groups = defaultdict(list)
    for path in files_of(before):
        groups[hashlib.sha256(before[path].text.encode()).digest()].append(path)
    doubles = {path: min(paths) for paths in groups.values() for path in paths if path != min(paths)}
    order = 'export LC_ALL=C; declare -A seen; while IFS= read -r f; do h=$(sha256sum < "$f"); if [ -n "${seen[$h]}" ]; then '
    loop = "done < <(find * -type f | sort)"
    if level < 3:
        prompt = "Some files below /work have the same content. Of each such group keep the file whose path (below /work) comes first in byte order, and delete the others."
        return Puzzle(prompt, before, without(before, doubles), f'{order}rm "$f"; else seen[$h]=$f; fi; {loop}')
    after = {**before, **{path: link(f"/work/{first}") for path, first in doubles.items()}}
    prompt = "Some files below /work have the same content. Of each such group keep the file whose path (below /work) comes first in byte order, and replace the others by symbolic links to it, each with its absolute path as target."
    return Puzzle(prompt, before, after, f'{order}ln -sf "/work/${{seen[$h]}}" "$f"; else seen[$h]=$f; fi; {loop}')


def remove_small(level: int, r: random.Random) -> Puzzle:
    """Files below a size go, and with them the folders that are then empty."""
    before = tree(r, 4 + 3 * level, depth=level)
    sizes = sorted(len(before[path].text) for path in files_of(before))
    limit = sizes[len(sizes) // 2]
    gone = [path for path in files_of(before) if len(before[path].text) < limit]
    after = without(before, gone)
    prompt = f"Delete every file below /work that has fewer than {limit} bytes."
    script = f"find . -type f -size -{limit}c -delete"
    if level > 1:
        before |= {f"{name}-empty": folder() for name in names(r, level)}
        after |= {path: node for path, node in before.items() if path not in gone}
        full = {parent for path in files_of(after) for parent in _above(path)}
        after = {path: node for path, node in after.items() if node.kind == "file" or path in full}
        prompt += " Then delete the folders below /work that hold no file at any depth."
        script += "; find . -mindepth 1 -type d -empty -delete"
    return Puzzle(prompt, before, after, script)


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def flatten(level: int, r: random.Random) -> Puzzle:
    """All files come to the top, their folders in their names."""
    before = tree(r, 3 + 2 * level, depth=1 + level)
    after = {path.replace("/", "_"): before[path] for path in files_of(before)}
    prompt = "Move all files below /work to /work itself. A file's new name is its path below /work with _ for each / (a/b.txt becomes a_b.txt). No folder is left."
    script = 'find * -type f | while IFS= read -r f; do n=${f//\\//_}; [ "$f" = "$n" ] || mv "$f" "$n"; done; find . -mindepth 1 -type d -delete'
    return Puzzle(prompt, before, dict(sorted(after.items())), script)


TEMPLATES = (rename_endings, sort_by_ending, remove_doubles, remove_small, flatten)
