"""`env score`: recorded replies and conversations, judged as they were played or refused."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from palaestra.gym.registry import UsageError, spec
from palaestra.gym.score import load, save, score_rows

FILE = """
from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.outcome import Cause, Failure

class Counter(Environment):
    \"\"\"Count up by a tool, then say the count.\"\"\"
    tasks = ()

    def setup(self, task):
        self.count = task.data["start"]

    @tool
    def up(self, by: int) -> int:
        self.count += by
        return self.count

    def respond(self, message):
        return "go on" if message.content == "wait" else None

    @reward
    def right(self, answer) -> float:
        return float(answer == str(self.count))

    @reward(weight=0.5)
    def polite(self, answer):
        if answer == "down":
            raise Failure(Cause.VERIFIER, "the judge died")
        return float("please" in answer)

    def alive(self):
        return False
"""


@pytest.fixture
def counter(tmp_path):
    path = tmp_path / "counter.py"
    path.write_text(FILE)
    return spec(str(path))


def up(by: int, id: str = "x") -> dict:
    call = {"id": id, "type": "function", "function": {"name": "up", "arguments": json.dumps({"by": by})}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(text: str, id: str = "x") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": id}


def say(text: str) -> dict:
    return {"role": "assistant", "content": text}


USER = {"role": "user", "content": "count"}


async def one(counter, **row):
    return (await score_rows(counter, [{"start": 1, **row}]))[0]


async def test_replies_are_judged_in_the_order_of_the_rows(counter):
    rows = [{"start": n, "reply": str(n % 3), "key": f"k{n}"} for n in range(20)]
    seen = []
    verdicts = await score_rows(counter, rows, 4, seen.append)
    assert [verdict.key for verdict in verdicts] == [f"k{n}" for n in range(20)]
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 1.0] + [0.0] * 17
    assert len(seen) == 20
    assert verdicts[0].rewards == {"right": 1.0, "polite": 0.0}
    assert verdicts[0].outcome == "ok"


async def test_tool_calls_are_replayed_into_a_fresh_environment(counter):
    messages = [USER, up(2), result("3"), up(4), result("7"), say("7")]
    assert (await one(counter, messages=messages)).reward == 1.0
    without_results = [up(2), up(4), say("7")]
    assert (await one(counter, messages=without_results)).reward == 1.0


async def test_what_the_environment_said_between_replies_is_part_of_the_recording(counter):
    messages = [USER, say("wait"), {"role": "user", "content": "go on"}, say("1")]
    assert (await one(counter, messages=messages)).reward == 1.0
    cut = await one(counter, messages=[USER, up(2)])
    assert (cut.outcome, cut.reward) == ("limit:turns", 0.0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"messages": [USER, up(2), result("99"), say("99")]},
            r"after reply 1 the recording says ..99.., replayed it says ..3..",
        ),
        ({"messages": [USER, say("1"), USER, say("2")]}, "the episode ends after reply 1 of 2"),
        ({"messages": [USER]}, "hold no reply"),
        ({"messages": [say("1"), USER]}, "no reply follows"),
        ({"messages": [{"role": "robot", "content": "1"}]}, "not a row to score"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a tool call must look like"),
        ({"messages": "text"}, "a message must be an object"),
        ({}, "either reply"),
        ({"reply": "1", "messages": []}, "either reply"),
        ({"reply": 5}, "must be text"),
    ],
)
async def test_what_cannot_be_replayed_is_refused(counter, row, text):
    verdict = await one(counter, **row)
    assert (verdict.outcome, verdict.reward) == ("refused", None)
    assert re.search(text, verdict.detail), verdict.detail


async def test_a_failure_of_infrastructure_is_null_never_zero(counter):
    verdict = await one(counter, reply="down")
    assert (verdict.reward, verdict.outcome) == (None, "verifier")
    missing = (await score_rows(counter, [{"reply": "1"}]))[0]
    assert (missing.reward, missing.outcome) == (None, "environment")
    assert "KeyError" in missing.detail


async def test_rows_without_a_key_get_one_from_their_data(counter):
    first, same, other = [(await one(counter, reply=text, start=n)).key for text, n in (("a", 1), ("b", 1), ("a", 2))]
    assert first == same != other


def test_files_are_read_and_written_whole(counter, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"start": 1, "reply": "1"}\n\n{"start": 2, "reply": "é"}\n')
    assert [row["start"] for row in load(source)] == [1, 2]
    with pytest.raises(UsageError, match="there is no data file"):
        load(tmp_path / "none.jsonl")
    source.write_text('{"start": 1}\n{"start"\n')
    with pytest.raises(UsageError, match="line 2: not JSON"):
        load(source)
    out = tmp_path / "new" / "out.jsonl"
    save(out, [])
    assert out.read_text() == ""
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


async def test_a_fatal_error_leaves_no_row_being_judged(counter):
    def fail(_):
        raise UsageError("the disk is full")

    with pytest.raises(UsageError, match="the disk is full"):
        await score_rows(counter, [{"start": 1, "reply": "1"}] * 20, 2, fail)
    assert asyncio.all_tasks() == {asyncio.current_task()}
