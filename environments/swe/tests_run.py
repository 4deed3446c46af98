"""Tests run in a box, and what came of each."""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from palaestra.environments.swe.repository import Repository
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Box, Entry
from palaestra.gym.types import Record

REPO, SITE = "/work/repo", "/opt/site"
RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
"""What runs the tests: pure Python, put into each box."""
OF_PYGMENTS = {
    f"pygments/{part}.py"
    for part in ("lexers/__init__", "lexers/_mapping", "lexers/diff", "lexers/python", "formatters/__init__",
                 "formatters/_mapping", "formatters/terminal", "styles/__init__", "styles/_mapping", "filters/__init__")
}  # fmt: skip
"""What pytest imports of its folders; the rest is nine tenths of it."""
ENVIRONMENT = "PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 PYTHONNOUSERSITE=1"
PYTEST = "-c /dev/null --rootdir=. -o addopts= -p no:cacheprovider -p palaestra_plugin -q --tb=short --disable-warnings"
METADATA = b"Metadata-Version: 2.1\nName: pytest\nVersion: 0\n"


class Report(Record):
    """What came of a run. `outcomes`: passed, failed or skipped by node id; `failures`: the texts of failed ones;
    `calls`: by test, the functions (file, qualified name) that it called; `skips`: how many tests, subtests and files
    were skipped or failed as expected. `status` is pytest's exit status, None where it did not come to its end."""

    status: int | None = None
    outcomes: Mapping[str, str] = {}
    failures: Mapping[str, str] = {}
    calls: Mapping[str, list[tuple[str, str]]] = {}
    skips: int = 0

    def passed(self) -> list[str]:
        """The tests that did."""
        return [test for test, outcome in self.outcomes.items() if outcome == "passed"]

    def all(self, tests: Iterable[str], allowed: Sequence[str] = ("passed",)) -> bool:
        """Whether all of the tests ran and came to what is allowed."""
        return all(self.outcomes.get(test) in allowed for test in tests)


@lru_cache(maxsize=1)
def site() -> dict[str, Entry]:
    """The files of the runner, taken from this Python. Raises UsageError where it is not installed."""
    found: dict[str, Entry] = {}
    for name in RUNNER:
        try:
            listed = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"SWE tasks need {name}: pip install 'palaestra[swe]'") from None
        for path in listed:
            if path.suffix == ".py" and ".." not in path.parts and _needed(path):
                found[f"{SITE}/{path}"] = Entry("file", 0o644, Path(str(path.locate())).read_bytes())
    found[f"{SITE}/pytest-0.dist-info/METADATA"] = Entry("file", 0o644, METADATA)
    found[f"{SITE}/palaestra_plugin.py"] = Entry("file", 0o644, Path(__file__).with_name("plugin.py").read_bytes())
    return found


def runs() -> frozenset[str]:
    """The names of the modules that run the tests. Raises as site does."""
    return frozenset(PurePath(path).relative_to(SITE).parts[0].removesuffix(".py") for path in site())


def _needed(path: PurePath) -> bool:
    return path.parts[0] != "pygments" or len(path.parts) == 2 or path.as_posix() in OF_PYGMENTS


def placed(files: Mapping[str, bytes]) -> dict[str, Entry]:
    """Files as entries of the repository's folder."""
    return {f"{REPO}/{path}": Entry("file", 0o644, content) for path, content in files.items()}


async def run(
    box: Box, repo: Repository, places: Iterable[str] = (), seconds: float = 120.0, cover: bool = False
) -> Report:
    """Run the tests at `places` (files or node ids; by default all of the repository's)."""
    report = f"/tmp/report-{secrets.token_hex(8)}"
    switches = f"PALAESTRA_REPORT={report}" + (f" PALAESTRA_COVER={REPO}/" if cover else "")
    command = (
        f"cd {REPO} && env {ENVIRONMENT} {switches} PYTHONPATH={SITE}:{REPO}/{repo.path} python3 -m pytest {PYTEST} "
        f"{shlex.join(sorted(places) or repo.arguments)} < /dev/null > /tmp/output 2>&1"
    )
    done = await box.exec(command, seconds)
    if done.stopped:
        return Report()
    try:
        content: Any = json.loads(await box.read(report))
        return Report.model_validate(content)
    except (OSError, ValueError):
        return Report()
