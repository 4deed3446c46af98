"""The evaluation loop: statistics, resuming, drift, what it writes."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import resource

import pyarrow.parquet
import pytest

from palaestra.gym import tables
from palaestra.gym.evaluate import EPISODES, Contest, Plan, evaluate, interval, pass_at_k, pass_hat_k, read, summarise
from palaestra.gym.files import write_whole
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policies import Null, build
from palaestra.gym.registry import UsageError, spec
from palaestra.gym.types import Completion, Message, Sampling

FILE = """
from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.types import Message, Task, ToolCall

def tasks(split, seed):
    for n in range(10):
        yield Task(key=f"{n}", prompt=f"say {n}", data={"answer": str(n)}, split=split)

class Echo(Environment):
    tasks = tasks

    @tool
    def twice(self, n: int) -> int:
        return 2 * n

    @reward
    def right(self, task, answer) -> float:
        return float(answer == task.data["answer"])

    def solution(self, task):
        call = ToolCall(id="c", name="twice", arguments='{"n": 1}')
        return [Message(role="assistant", tool_calls=(call,)), Message(role="assistant", content=task.data["answer"])]
"""


class Fixed(Null):
    """Always the same text; counts its replies."""

    def __init__(self, text: str) -> None:
        self.text, self.count = text, 0

    async def reply(self, *_):
        self.count += 1
        return Completion(
            Message(role="assistant", content=self.text), usage={"prompt_tokens": 4, "completion_tokens": 2}
        )


class Down(Null):
    """A server that fails for a while."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def reply(self, *_):
        self.failures -= 1
        if self.failures >= 0:
            raise Failure(Cause.MODEL_SERVER, "down")
        return Completion(Message(role="assistant", content="0"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text(FILE)
    return path


def contest(file, policies, **plan) -> Contest:
    return Contest(policies, [spec(str(file))], Plan(**{"tasks": 5, **plan}))


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_and_pass_hat_k_are_the_shares_of_all_choices(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(x) for x in choices) / len(choices))
        assert pass_hat_k(n, c, k) == pytest.approx(sum(all(x) for x in choices) / len(choices))


def test_wilsons_interval_for_shares_and_a_bootstrap_for_the_rest():
    wilson = interval([1.0] * 8 + [0.0] * 2)
    assert (wilson.low, wilson.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    values = [0.1 * i for i in range(11)]
    boot = interval(values)
    error = 1.96 * math.sqrt(sum((v - 0.5) ** 2 for v in values)) / 11
    assert boot.mean == pytest.approx(0.5)
    assert boot.high - boot.low == pytest.approx(2 * error, rel=0.1)
    assert interval([]) is None


async def test_policies_by_environments_with_attempts_are_summed_up(file, tmp_path):
    policies = {"scripted:gold": build("scripted:gold"), "three": Fixed("3")}
    plan = contest(file, policies, attempts=2)
    rows = await evaluate(plan, tmp_path / "out")
    gold, three = summarise(rows, plan.plan)
    assert (gold.reward.mean, gold.pass_hat_k.mean, gold.tool_calls, gold.turns) == (1.0, 1.0, 1.0, 2.0)
    assert (three.reward.mean, three.pass_at_k.mean) == (pytest.approx(0.2), pytest.approx(0.2))
    assert (three.prompt_tokens, three.completion_tokens) == (4.0, 2.0)
    assert (three.tasks, three.episodes, three.k, three.unscored) == (5, 10, 2, 0)


async def test_the_same_plan_again_plays_nothing_and_a_cut_line_only_itself(file, tmp_path):
    first = Fixed("3")
    plan = contest(file, {"p": first})
    rows = await evaluate(plan, tmp_path)
    again = Fixed("3")
    assert await evaluate(contest(file, {"p": again}), tmp_path) == rows
    assert (first.count, again.count) == (5, 0)
    path = tmp_path / EPISODES
    path.write_bytes(path.read_bytes()[:-20])
    assert await evaluate(contest(file, {"p": again}), tmp_path) != []
    assert again.count == 1
    assert len(read(path)) == 5
    await evaluate(contest(file, {"p": again}, tasks=7, attempts=2), tmp_path)
    assert again.count == 1 + 9


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: ({"file": FILE.replace("2 * n", "3 * n")}, {}), "another environment"),
        (lambda file: ({"file": FILE.replace("say {n}", "tell {n}")}, {}), "another environment, task"),
        (lambda file: ({}, {"sampling": Sampling(temperature=0.1)}), "another sampling"),
    ],
)
async def test_drift_is_refused(file, tmp_path, change, text):
    await evaluate(contest(file, {"p": Fixed("3")}), tmp_path)
    files, plan = change(file)
    file.write_text(files.get("file", FILE))
    with pytest.raises(UsageError, match=text):
        await evaluate(contest(file, {"p": Fixed("3")}, **plan), tmp_path)


async def test_a_policy_whose_weights_changed_is_refused(file, tmp_path):
    policy = Fixed("3")
    policy.sha256 = "a"
    await evaluate(contest(file, {"p": policy}), tmp_path)
    policy.sha256 = "b"
    with pytest.raises(UsageError, match="another policy"):
        await evaluate(contest(file, {"p": policy}), tmp_path)


async def test_a_foreign_results_file_is_refused(file, tmp_path):
    (tmp_path / EPISODES).write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="line 1"):
        await evaluate(contest(file, {"p": Fixed("3")}), tmp_path)


async def test_infrastructure_is_retried_then_unscored_and_played_again_later(file, tmp_path):
    rows = await evaluate(contest(file, {"p": Down(2)}, tasks=1), tmp_path / "a")
    assert rows[0].reward == 1.0
    plan = contest(file, {"p": Down(3)}, tasks=1)
    rows = await evaluate(plan, tmp_path / "b")
    assert (rows[0].reward, rows[0].outcome) == (None, "model-server")
    summary = summarise(rows, plan.plan)[0]
    assert (summary.unscored, summary.reward) == (1, None)
    rows = await evaluate(contest(file, {"p": Down(0)}, tasks=1), tmp_path / "b")
    assert rows[0].reward == 1.0


async def test_two_environments_of_one_name_are_refused(file, tmp_path):
    both = Contest({"p": Null()}, [spec(str(file)), spec(str(file))], Plan())
    with pytest.raises(UsageError, match="two environments are named echo"):
        await evaluate(both, tmp_path)


async def test_tables_are_written_and_what_a_model_wrote_is_escaped(file, tmp_path):
    plan = contest(file, {"<b>evil": Fixed("<script>alert(1)</script>")})
    rows = await evaluate(plan, tmp_path)
    summaries = summarise(rows, plan.plan)
    tables.write(tmp_path, summaries, rows)
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>evil" not in page
    assert "Episodes (3 of 5)" in page
    table = pyarrow.parquet.read_table(tmp_path / "episodes.parquet")
    assert table.num_rows == 5
    assert json.loads(table["messages"][0].as_py())[-1]["content"] == "<script>alert(1)</script>"
    assert json.loads((tmp_path / "summary.json").read_text())[0]["reward"]["mean"] == 0.0
    assert tables.table(summaries).row_count == 1
    assert len(tables.table(summaries, short=True).columns) == len(tables.SHORT)
    assert not list(tmp_path.glob("*.part"))


async def test_a_full_disk_is_named_and_what_was_cut_is_played_again(file, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*episodes.jsonl: File too large; free space there"):
            await evaluate(contest(file, {"p": Fixed("3")}), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < len((tmp_path / EPISODES).read_bytes()) <= 3000
    rows = await evaluate(contest(file, {"p": Fixed("3")}), tmp_path)
    assert [row.reward for row in rows] == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert len(read(tmp_path / EPISODES)) == 5


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b"
    write_whole(path, b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UsageError, match="free space there"):
            write_whole(path, b"second" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


async def test_a_folder_that_cannot_be_made_is_named(file, tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        await evaluate(contest(file, {"p": Fixed("3")}), file / "out")


async def test_a_fatal_error_leaves_no_episode_running(file, tmp_path):
    def fail(done, total, row):
        if row is not None:
            raise UsageError("the screen is gone")

    with pytest.raises(UsageError, match="the screen is gone"):
        await evaluate(contest(file, {"p": Fixed("3")}, concurrency=2), tmp_path, fail)
    assert asyncio.all_tasks() == {asyncio.current_task()}
