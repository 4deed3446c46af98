"""Several tasks at once, each in a folder of its own."""

from __future__ import annotations

import random
import re

from palaestra.tasks.terminal import archives, configs, files, texts
from palaestra.tasks.terminal.content import names
from palaestra.tasks.terminal.puzzle import Node, Puzzle, Template, Tree, folder

LINKS: tuple[Template, ...] = (*files.TEMPLATES, *texts.TEMPLATES, *archives.TEMPLATES, *configs.TEMPLATES)


def chain(level: int, r: random.Random) -> Puzzle:
    """Two to four tasks of the first levels."""
    before: Tree = {}
    after: Tree = {}
    prompts, scripts = [], []
    for name in names(r, 1 + level):
        part = r.choice(LINKS)(max(1, level - 1), r)
        before |= _below(name, part.before)
        after |= _below(name, part.after)
        prompts.append(_lowered(part.prompt, name))
        scripts.append(f"(cd {name}; {_lowered(part.script, name)}\n)")
    listed = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, 1))
    return Puzzle(f"Do all of this:\n{listed}", before, after, "\n".join(scripts))


def _lowered(text: str, name: str) -> str:
    """The text with each path below /work led into the part's own folder."""
    return re.sub(r"/work(?![\w-])", f"/work/{name}", text)


def _below(name: str, tree: Tree) -> Tree:
    moved: Tree = {name: folder()}
    for path, node in tree.items():
        moved[f"{name}/{path}"] = _moved(node, name)
    return moved


def _moved(node: Node, name: str) -> Node:
    return node.model_copy(update={"text": _lowered(node.text, name)}) if node.kind == "link" else node


TEMPLATES = (chain,)
