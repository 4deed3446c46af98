"""Archives: packing, unpacking, repairing."""

from __future__ import annotations

import random

from palaestra.tasks.terminal.content import files_of, names, text, tree
from palaestra.tasks.terminal.puzzle import Node, Puzzle, Tree, file, with_folders, without

FORMATS = {"tar.gz": "tar -xzf {}", "tar.xz": "tar -xJf {}", "tar": "tar -xf {}", "zip": "python3 -m zipfile -e {} ."}


def archive(form: str, members: dict[str, str]) -> Node:
    """An archive of text files; checked by its members, not by its bytes."""
    return Node(kind="archive", parts={"format": form, "members": members})


def unpack(level: int, r: random.Random) -> Puzzle:
    """Archives are unpacked where they lie, and deleted."""
    before: Tree = {}
    after: Tree = {}
    commands = []
    for name in names(r, level):
        form = r.choice(sorted(FORMATS))
        members = {f"{name}/{inner}.txt": text(r, r.randint(1, 3)) for inner in names(r, 1 + level)}
        before[f"{name}.{form}"] = archive(form, members)
        after |= {path: file(content) for path, content in members.items()}
        commands.append(f"{FORMATS[form].format(f'{name}.{form}')} && rm {name}.{form}")
    what = "the archive" if level == 1 else "all archives"
    return Puzzle(
        f"Unpack {what} in /work into /work, then delete {'it' if level == 1 else 'them'}.",
        before,
        with_folders(after),
        "; ".join(commands),
    )


def pack(level: int, r: random.Random) -> Puzzle:
    """Files of one ending go into an archive; from level 2 they then are deleted."""
    before = tree(r, 3 + 3 * level, depth=level)
    ending = r.choice(files_of(before)).rpartition(".")[2]
    form = r.choice(("tar", "tar.gz", "tar.xz"))
    chosen = [path for path in files_of(before) if path.endswith(f".{ending}")]
    packed = archive(form, {path: before[path].text for path in chosen})
    after = {**(without(before, chosen) if level > 1 else before), f"packed.{form}": packed}
    flag = {"tar": "", "tar.gz": "z", "tar.xz": "J"}[form]
    prompt = f"Pack all files below /work whose names end in .{ending} into /work/packed.{form}, under their paths below /work (without a leading ./), and nothing else; no folder is a member."
    script = f"find * -type f -name '*.{ending}' -print0 > /tmp/list; tar --null -T /tmp/list -c{flag}f packed.{form}; "
    if level > 1:
        prompt += " Then delete the files that were packed."
        script += "xargs -0 rm < /tmp/list; "
    return Puzzle(prompt, before, after, script + "rm /tmp/list")


def newest_in_archive(level: int, r: random.Random) -> Puzzle:
    """One member of an archive is changed, the others stay."""
    inner = names(r, 2 + level)
    members = {f"{name}.conf": f"name={name}\nlimit={r.randint(1, 50)}\n" for name in inner}
    form = r.choice(("tar", "tar.gz"))
    chosen, limit = r.choice(inner), r.randint(51, 99)
    changed = {**members, f"{chosen}.conf": f"name={chosen}\nlimit={limit}\n"}
    flag = {"tar": "", "tar.gz": "z"}[form]
    prompt = f"In the archive /work/settings.{form}, change the limit in {chosen}.conf to {limit}. The other members stay as they are, and /work holds nothing but the archive."
    script = (
        f"mkdir /tmp/x && tar -C /tmp/x -x{flag}f settings.{form} && sed -i 's/^limit=.*/limit={limit}/' /tmp/x/{chosen}.conf && "
        f"(cd /tmp/x && tar -c{flag}f /work/settings.{form} *) && rm -r /tmp/x"
    )
    return Puzzle(
        prompt, {f"settings.{form}": archive(form, members)}, {f"settings.{form}": archive(form, changed)}, script
    )


TEMPLATES = (unpack, pack, newest_in_archive)
