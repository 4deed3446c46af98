"""What the README and the docs tell people to type really works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from palaestra.environments.sandbox.backends import lacks_native
from palaestra.environments.swe.environment import Built, shipped
from palaestra.tasks.terminal import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of every fenced block of a language; those marked slow belong to the bars.

    Blocks that need one another (a file's name, `own`) are typed by test_newcomer.py.
    """
    found = []
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found.append((page.name, block))
    return found


COMMANDS = [(page, line) for page, block in blocks("console") for line in block.splitlines() if line.strip()]


def failure(line, folder, seconds):
    """What a command that failed printed; empty where it worked."""
    program, *arguments = shlex.split(line)
    done = subprocess.run([BIN / program, *arguments], cwd=folder, capture_output=True, text=True, timeout=seconds)
    return f"{line}: status {done.returncode}\n{done.stdout}\n{done.stderr}" if done.returncode else ""


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_documented_command_works(page, line, tmp_path):
    assert not failure(line, tmp_path, 110), page


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("page", "block"), blocks("console slow"))
def test_a_documented_block_that_takes_long_works(page, block, tmp_path):
    for line in block.splitlines():
        assert not failure(line, tmp_path, 1000), page


SANDBOX = (ROOT / "docs" / "sandbox.md").read_text()
FILES = dict(re.findall(r"^```python (\S+)\n(.*?)^```", SANDBOX, re.MULTILINE | re.DOTALL))
(TYPED,) = re.findall(r"^```console own\n(.*?)^```", SANDBOX, re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(bool(lacks_native()), reason="no native sandbox on this machine")
def test_the_programs_of_the_page_on_sandboxes_do_what_it_says(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (row,) = re.findall(r"`({.*?})`; in `counting.py`", SANDBOX)
    given = json.loads(row)
    rows = [{**given, "id": str(n), "files": n} for n in range(40)]
    (tmp_path / "counts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for line in ("python box.py", *TYPED.splitlines()):
        assert not failure(line, tmp_path, 110)
    summary = json.loads((tmp_path / "runs" / "eval" / "summary.json").read_text())
    assert {one["policy"]: one["reward"]["mean"] for one in summary} == {"scripted:gold": 1.0, "null": 0.0}


def test_the_program_of_the_page_on_models_runs(tmp_path):
    ((page, text),) = blocks(r"python model\.py")
    (tmp_path / "model.py").write_text(text)
    done = subprocess.run([sys.executable, "model.py"], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert (page, done.stdout) == ("model.md", "torch.Size([2, 10, 2048])\n"), done.stderr


def test_the_readme_counts_tasks_right():
    readme = (ROOT / "README.md").read_text()
    tasks = list(Built(shipped()))
    packages = {task.data["package"] for task in tasks}
    assert f"{len(tasks)} bugs in {len(packages)} packages" in readme
    assert f"| {len(tasks)} tasks of {len(packages)} packages |" in (ROOT / "tasks" / "DATA.md").read_text()
    templates = sum(len(family) for family in FAMILIES.values())
    assert f"{templates} templates of shell tasks" in readme
