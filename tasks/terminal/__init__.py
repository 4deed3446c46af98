"""Shell tasks whose whole end state is known: `shell_tasks` draws them, a module for each family."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from palaestra.tasks.generated import Drawn, Generated
from palaestra.tasks.terminal import (
    archives,
    builds,
    chains,
    configs,
    databases,
    files,
    first,
    permissions,
    repositories,
    services,
    texts,
)
from palaestra.tasks.terminal.puzzle import Template, Tree, with_folders

FAMILIES: dict[str, tuple[Template, ...]] = {
    "first": (first.first_steps,),
    "files": files.TEMPLATES,
    "texts": texts.TEMPLATES,
    "permissions": permissions.TEMPLATES,
    "archives": archives.TEMPLATES,
    "repositories": repositories.TEMPLATES,
    "databases": databases.TEMPLATES,
    "services": services.TEMPLATES,
    "builds": builds.TEMPLATES,
    "configs": configs.TEMPLATES,
    "chains": chains.TEMPLATES,
}

PROGRAMS: dict[str, tuple[str, ...]] = {
    "archives": ("tar", "xz", "python3"),
    "repositories": ("git",),
    "databases": ("sqlite3",),
    "services": ("pgrep", "pkill", "python3"),
    "builds": ("make", "gcc"),
    "configs": ("python3",),
}
"""What the families' tasks take for granted, beyond what every Debian has."""


def shell_tasks(levels: Sequence[int], families: Sequence[str] = ()) -> Generated:
    """Tasks of the families (all of them, when none is named), the levels in turn. Raises ValueError for a family that
    there is not."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"there is no family {', '.join(unknown)} of shell tasks; known: {', '.join(FAMILIES)}")
    templates = [(family, make) for family in families or FAMILIES for make in FAMILIES[family]]

    def draw(level: int, r: random.Random) -> Drawn:
        family, make = r.choice(templates)
        return drawn(family, make, level, r)

    return Generated("shell", draw, levels)


def drawn(family: str, template: Template, level: int, r: random.Random) -> Drawn:
    """A puzzle of a template as prompt and data. One in which nothing is to be done is drawn again."""
    puzzle = template(level, r)
    while not puzzle.checks and with_folders(puzzle.after) == with_folders(puzzle.before):
        puzzle = template(level, r)
    data: dict[str, Any] = {
        "family": family,
        "template": template.__name__,
        "before": _plain(puzzle.before),
        "after": _plain(puzzle.after),
        "setup": puzzle.setup,
        "script": puzzle.script,
        "checks": list(puzzle.checks),
    }
    return Drawn(puzzle.prompt, data)


def _plain(tree: Tree) -> dict[str, Any]:
    return {path: node.model_dump(exclude_defaults=True) for path, node in with_folders(tree).items()}
