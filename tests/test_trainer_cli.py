"""`palaestra train` as a user meets it, and what a run shows."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from pyarrow import parquet
from typer.testing import CliRunner

from palaestra.gym import files
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Completion, Episode, Group, Message, Outcome, Scored, Task, Turn, Unscored
from palaestra.model.presets import PRESETS
from palaestra.rollout.pool import PoolError
from palaestra.trainer import evaluation, metrics, report
from palaestra.trainer.cli import train
from palaestra.trainer.recipe import load

spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).with_name("test_trainer_run.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
app = typer.Typer()
app.command()(train)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano-test", toy.NANO)
    (tmp_path / "world.py").write_text(toy.WORLD)
    path = tmp_path / "toy.toml"
    path.write_text(toy.RECIPE.format(world=f"{tmp_path / 'world.py'}:Toy"))
    return lambda *more: CliRunner().invoke(app, [str(path), "--runs", str(tmp_path / "runs"), *more])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model=preset:huge", "no preset 'huge'"),
        ("model=warmstrat", "did you mean 'warmstart'"),
        ("environments.code.config.backend=foo", "environments.code: .*no sandbox backend 'foo'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        train("quickstart", [change], dry_run=True, runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_resolved_recipe_and_writes_nothing(command, tmp_path):
    done = command("stages.rl.steps=9", "--dry-run")
    assert done.exit_code == 0
    assert json.loads(done.output)["stages"]["rl"]["steps"] == 9
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_being_trained_in_is_refused_and_named(command, tmp_path):
    folder = tmp_path / "runs" / "toy"
    with files.held(folder):
        (folder / "recipe.json").write_text("{}")
        for more in ([], ["--resume"]):
            refused = command(*more)
            assert isinstance(refused.exception, UsageError)
            if not more:
                assert f"{folder} is in use by process {os.getpid()}" in str(refused.exception)
    (folder / "recipe.json").unlink()
    folder.rmdir()
    with files.held(folder):
        done = command()
    assert f"in use by process {os.getpid()}; wait for its end, or choose another name" in str(done.exception)
    assert not folder.exists()


def test_a_stage_that_its_minutes_ended_says_so_and_every_step_is_a_line(command, tmp_path):
    done = command("stages.rl.steps=200", "stages.rl.minutes=0.0001")
    assert done.exit_code == 0, done.output
    assert "rl 1/200  other 0." in done.output
    assert "after, greedy" in done.output
    assert "rl: 1 of 200 steps, all that its 0.0001 minutes allowed" in done.output
    summary = json.loads((tmp_path / "runs" / "toy" / "summary.json").read_text())
    assert summary["stages"] == {"rl": {"steps": 1, "of": 200}}
    assert "rl: 1 of 200 steps" in (tmp_path / "runs" / "toy" / "report.html").read_text()
    again = command("stages.rl.steps=1")
    assert f"{tmp_path / 'runs' / 'toy'} has ended: a new run begins in {tmp_path / 'runs' / 'toy-2'}" in again.output


NEEDY = """
from palaestra.gym.registry import UsageError
from toy_world import Toy


class Needy(Toy):
    @classmethod
    async def open(cls, config):
        raise UsageError("no such machine")
"""


@pytest.fixture
def needy(tmp_path, monkeypatch):
    """Overrides that add an environment which this machine cannot play."""
    (tmp_path / "toy_world.py").write_text(toy.WORLD)
    (tmp_path / "needy.py").write_text(NEEDY)
    monkeypatch.syspath_prepend(tmp_path)
    return [f'environments.more.use="{tmp_path / "needy.py"}:Needy"', "environments.more.optional=true"]


def test_an_optional_environment_is_left_out_where_the_machine_lacks_what_it_needs(command, needy):
    done = command(*needy, "--dry-run")
    assert "without more: no such machine" in done.stderr
    assert list(json.loads(done.stdout)["environments"]) == ["toy", "other"]


def test_an_environment_that_is_needed_is_not_left_out(command, needy):
    done = command(needy[0], "stages.rl.steps=1", "evaluation.tasks=3")
    assert isinstance(done.exception, UsageError)
    assert "no such machine" in str(done.exception)


def test_a_run_of_nothing_but_what_cannot_be_played_is_refused(command, needy):
    done = command(*(override.replace("more", name) for name in ("toy", "other") for override in needy))
    assert "can play none of the environments" in str(done.exception)


def test_a_run_ends_with_a_line_for_each_environment(command, tmp_path):
    done = command("stages.rl.steps=1", "evaluation.tasks=3")
    assert done.exit_code == 0, done.output
    assert "3 held-out tasks" in done.output
    folder = tmp_path / "runs" / "toy"
    assert json.loads((folder / "recipe.json").read_text())["name"] == "toy"
    assert "torch" in json.loads((folder / "versions.json").read_text())
    assert f"report: {folder / 'report.html'}" in done.output
    rows = parquet.read_table(folder / "episodes" / "rl-000000.parquet").to_pylist()
    assert len(rows) == 16
    assert {"round", "sample", "environment", "key", "reward", "advantage", "messages"} <= set(rows[0])
    assert json.loads(rows[0]["messages"])[-1]["role"] == "assistant"
    for name in ("before-mean", "before-greedy", "after-mean", "after-greedy"):
        assert parquet.read_metadata(folder / "episodes" / f"{name}.parquet").num_rows == 6
    ended = command("stages.rl.steps=1", "evaluation.tasks=3", "--resume")
    assert "the latest run toy has ended" in str(ended.exception)
    assert command("stages.rl.steps=1", "evaluation.tasks=0").exit_code == 0
    assert (tmp_path / "runs" / "toy-2" / "summary.json").exists()


def test_a_run_without_a_signal_says_that_it_learned_nothing(command, tmp_path):
    (tmp_path / "world.py").write_text(toy.WORLD.replace("if drawn else 0.0", "* 0 if drawn else 0.0"))
    done = command("stages.rl.steps=1", "evaluation.tasks=0")
    assert done.exit_code == 0, done.output
    assert "nothing was learned" in done.output


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=preset:huge"], "no preset 'huge'"),
        (["model=nowhere"], "no checkpoint folder nowhere"),
        (["model=warmstrat"], "did you mean 'warmstart'"),
        (["environments.toy.use=maths"], "unknown environment 'maths'"),
        (["environments.toy.config.x=1"], "has no config key 'x'"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_left_behind(command, tmp_path, overrides, words):
    done = command(*overrides)
    assert done.exit_code != 0
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
    assert not (tmp_path / "runs").exists()


def episode(task, value, text="hi"):
    result = Scored(value=value) if value is not None else Unscored(cause="tools")
    turn = Turn("main", None, task.messages(), Completion(Message(role="assistant", content=text)))
    return Episode("e", task, (turn,), result=result)


def test_gains_are_paired_by_task_and_the_unscored_are_left_out():
    before = {"a": 0.0, "b": 1.0, "c": 0.0, "lost": 1.0}
    after = {"a": 1.0, "b": 1.0, "c": 1.0}
    gain = evaluation.paired(before, after)
    half = 1.959964 * np.std([1, 0, 1], ddof=1) / np.sqrt(3)
    assert gain["mean"] == pytest.approx(2 / 3)
    assert (gain["low"], gain["high"]) == pytest.approx((2 / 3 - half, 2 / 3 + half))
    assert gain["tasks"] == 3
    assert evaluation.paired({}, after)["tasks"] == 0


class Lossy:
    """A player that loses each episode's first `lost` attempts, in one way or the other."""

    def __init__(self, lost):
        self.lost, self.works = lost, []

    async def play(self, work):
        self.works.append(work)
        if work.provenance["attempt"] < self.lost:
            if work.provenance["task"] == "0":
                raise Failure(Cause.ENVIRONMENT, "the actor died")
            outcome = Outcome(cause=Cause.MODEL_SERVER, detail="the server died")
            return replace(episode(work.task, None), outcome=outcome)
        return episode(work.task, 1.0)


def test_an_evaluation_plays_what_was_lost_again_and_stops_where_too_much_is(command, tmp_path):
    recipe = load(str(tmp_path / "toy.toml"))
    tasks = {"toy": [Task(key=str(number), prompt="p", environment="toy") for number in range(4)]}
    player = Lossy(2)
    found = asyncio.run(evaluation.evaluate(player, tasks, recipe))
    assert found.scores["toy"] == {mode: dict.fromkeys("0123", 1.0) for mode in ("mean", "greedy")}
    assert {mode: len(played) for mode, played in found.episodes.items()} == {"mean": 4, "greedy": 4}
    assert sum(found.retried.values()) == 2 * 4 * 2
    assert len(player.works) == 2 * 4 * 3
    with pytest.raises(PoolError, match="4 of 4 episodes of the evaluation have no score; the first: the actor died"):
        asyncio.run(evaluation.evaluate(Lossy(3), tasks, recipe))


def test_a_steps_description_counts_what_happened():
    task = Task(key="k", prompt="p", environment="a")
    group = Group(task, 4, [episode(task, 1.0), episode(task, 0.0), episode(task, None)])
    found = metrics.describe([group], [np.array([1.0, -1.0, 0.0])], 4, {4: 30, 3: 10})
    assert found["reward/a"] == 0.5
    assert found["unscored_share"] == found["zero_advantage_share"] == pytest.approx(1 / 3)
    assert (found["staleness/0"], found["staleness/1"]) == (0.75, 0.25)


def test_a_resumed_log_drops_rows_past_the_checkpoint_and_a_half_written_one(tmp_path):
    log = metrics.Log(tmp_path, "rl", 0)
    for step in range(4):
        log.write(step, {"loss": float("nan") if step else 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "rl", "st')
    log = metrics.Log(tmp_path, "rl", 2)
    log.write(2, {"loss": 5.0})
    log.close()
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, None), (2, 5.0)]


def test_tensorboard_reads_what_is_written_and_a_resumed_run_goes_on_in_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, 3), (2, 4)):
        log = metrics.Log(tmp_path, "rl", first)
        for step in range(first, steps):
            log.write(step, {"loss": 10.0 * first + step, "nothing": float("nan")})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 22), (3, 23)]


def test_the_report_escapes_what_a_model_wrote(tmp_path):
    evil = "<script>alert(1)</script>"
    task = Task(key=evil, prompt=evil, environment="<b>", data={"answer": evil})
    report.curves([{"reward/<b>": 0.5, "loss": 1.0}], tmp_path / "c.png")
    report.page(
        evil, {"environments": {}, "stages": {}}, tmp_path / "c.png", [episode(task, 1.0, evil)], tmp_path / "r.html"
    )
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;") >= 4
