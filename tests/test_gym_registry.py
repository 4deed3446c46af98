"""Finding environments: by file, dotted path, entry point and prefix."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import cloudpickle
import pytest

from palaestra.gym import worker
from palaestra.gym.registry import UsageError, configure, descriptions, spec

FILE = '''
import dataclasses
from pathlib import Path
from pydantic import BaseModel
from palaestra.gym.environment import Environment, reward
from palaestra.gym.types import Task
from palaestra.gym.worker import worker

def tasks(split, seed):
    for n in range(3):
        yield Task(key=f"{split}-{seed}-{n}", prompt="?", data={"answer": "a"})

def judge(answer):
    return float(answer == "a")

class Mine(Environment):
    """Say a."""
    tasks = tasks
    class Config(BaseModel):
        size: int = 3
        model_config = {"extra": "forbid"}

    @reward
    async def right(self, answer) -> float:
        return await worker(judge, answer, timeout=30)

    def solution(self, task):
        return "a"
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_file_is_loaded_by_content_without_touching_sys_path(file, tmp_path):
    before = list(sys.path)
    found = spec(str(file))
    assert sys.path == before
    assert found.alias == "mine"
    assert found.environment() is spec(f"{file}:Mine").environment()
    first = next(found.tasks("train", 5))
    assert (first.key, first.environment) == ("train-5-0", "mine")
    file.write_text(FILE.replace("Say a", "Say b"))
    assert spec(str(file)).environment() is not found.environment()
    assert spec(str(file)).sha256 != found.sha256


def test_a_shipped_file_loads_where_the_path_does_not_exist(file):
    found = spec(f"other={file}", {"size": 4})
    assert found.alias == "other"
    shipped = cloudpickle.loads(cloudpickle.dumps(found))
    file.unlink()
    environment = shipped.environment()
    assert environment.__doc__ == "Say a."
    assert Path(sys.modules[environment.__module__].__file__).read_text() == FILE
    assert shipped.settings().size == 4


def test_a_judge_of_a_file_runs_in_a_worker_process(file):
    try:
        kind = spec(str(file)).environment()
        assert asyncio.run(kind().right("a")) == 1.0
    finally:
        worker.shut()


def test_the_fingerprint_moves_with_source_and_configuration(file):
    prints = {spec(str(file)).fingerprint(), spec(str(file), {"size": 4}).fingerprint()}
    assert spec(str(file), {"size": 3}).fingerprint() in prints
    assert len(prints) == 2


def test_a_task_is_found_by_key(file):
    assert spec(str(file)).task("train-0-2").key == "train-0-2"
    with pytest.raises(UsageError, match="no task 'nope'"):
        spec(str(file)).task("nope")


def test_a_dotted_path_is_imported():
    found = spec("palaestra.gym.environment:Environment")
    assert found.source is None
    assert len(found.sha256) == 64
    with pytest.raises(UsageError, match="no tasks in split"):
        next(found.tasks("train", 0))


def test_a_prefix_is_answered_by_its_adapter():
    assert spec("gymnasium:CartPole-v1").environment().id == "CartPole-v1"


def test_installed_environments_are_described_without_importing_them():
    found = descriptions()
    assert {"math", "code", "search"} <= set(found)


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("mth", "did you mean 'math'"),
        ("no.such.module:X", "cannot import no.such.module"),
        ("palaestra.gym.environment:Environmnt", "no Environment named 'Environmnt'"),
        ("nowhere/x.py:X", r"the environment file /.*/nowhere/x.py: No such file .*\(nowhere/x.py is looked for"),
    ],
)
def test_a_wrong_reference_names_the_fix_in_one_line(ref, text):
    with pytest.raises(UsageError, match=text) as caught:
        spec(ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = (", "cannot be loaded: SyntaxError"),
        ("import no_such_thing", r"No module named 'no_such_thing' \(.*/wrong.py, line 1\)"),
        ("import json\njson.loads('')", r"Expecting value.*\(.*/wrong.py, line 2\)"),
        ("x = 1", "no Environment"),
        (FILE + "\nclass Two(Environment): pass", "name the class"),
    ],
)
def test_a_wrong_file_names_the_fault(tmp_path, source, text):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=text):
        spec(str(path))


def test_a_bad_configuration_names_the_key(file):
    kind = spec(str(file)).environment()
    with pytest.raises(UsageError, match="no config key 'sise': did you mean 'size'"):
        configure(kind, {"sise": 1}, "mine")
    with pytest.raises(UsageError, match=r"config\.size: Input should be a valid integer"):
        spec(str(file), {"size": "many"})


def test_an_empty_split_is_named(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("from palaestra.gym.environment import Environment\nclass E(Environment):\n    tasks = ()\n")
    with pytest.raises(UsageError, match="no tasks in split 'train'; there are: no tasks at all"):
        list(spec(str(path)).tasks("train", 0))


def test_an_error_in_a_task_generator_is_shown_with_its_place(file):
    file.write_text(FILE.replace("    for n in range(3):", "    for n in range(int('three')):"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if "three" in text)
    with pytest.raises(UsageError, match=rf"tasks of split 'train': ValueError: .*'three' \({file}, line {line}\)$"):
        next(spec(str(file)).tasks("train", 0))
