"""The shape of the house: arrows point one way, every package ships, the light rooms stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "gym": set(),
    "kernels": set(),
    "tasks": {"gym"},
    "environments": {"gym", "tasks"},
    "model": {"gym", "kernels"},
    "rollout": {"gym", "kernels", "model"},
    "trainer": {"gym", "kernels", "model", "rollout"},
}
FILES = sorted(file for room in ALLOWED for file in (ROOT / room).rglob("*.py"))
ACTOR_LINES = 30


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert not node.level, "relative imports hide which room they enter"
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    room = file.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[1] for name in imported(ast.parse(file.read_text())) if name.startswith("palaestra.")}
    assert rooms <= ALLOWED[room] | {room}


def test_every_package_on_disk_ships():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {
        "palaestra." + ".".join(file.parent.relative_to(ROOT).parts) for file in FILES if file.name == "__init__.py"
    }
    assert listed == on_disk
    assert all((file.parent / "__init__.py").exists() for file in FILES)
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    ["palaestra.gym.episode", "palaestra.gym.cli", "palaestra.environments.math", "palaestra.environments.code"],
)
def test_light_rooms_import_without_torch_or_ray(module):
    code = (
        "import sys\n"
        "for name in ('torch', 'ray', 'transformers', 'datasets'): sys.modules[name] = None\n"
        f"import {module}"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def actors() -> list[tuple[str, int]]:
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Actor"):
                found.append((f"{file.relative_to(ROOT)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1))
    return found


def test_actors_are_thin_wrappers():
    lines = dict(actors())
    assert lines, "no actor found: this test looks for classes whose name ends in Actor"
    assert all(count <= ACTOR_LINES for count in lines.values()), lines
