"""Contract tests of the nouns, the recorder and run_episode."""

from __future__ import annotations

import asyncio
import math
import os
import time
from types import MappingProxyType

import numpy as np
import pytest

from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment, ToolError, ToolUnavailable, metric, reward, tool
from palaestra.gym.episode import Bounds, MissedDeadline, run_episode
from palaestra.gym.outcome import RULES, Cause, Failure
from palaestra.gym.policy import Replay
from palaestra.gym.types import Completion, Generation, Limits, Message, Sampling, Scored, Task, ToolCall, Unscored
from palaestra.gym.worker import worker

TASK = Task(key="sum", prompt="2 + 3 = ?", data={"answer": "5"})


def call(name: str, arguments: str = "{}") -> Message:
    return Message(role="assistant", tool_calls=(ToolCall(id="", name=name, arguments=arguments),))


def say(text: str) -> Message:
    return Message(role="assistant", content=text)


def play(environment, messages, agent=None, bounds=None, policies=None, task=TASK):
    policies = policies or {"main": Replay(messages)}
    return asyncio.run(run_episode(environment, agent or Loop(), policies, task, Sampling(), "e", bounds))


class Adder(Environment):
    """Answer a sum."""

    down = 0

    @tool
    def add(self, a: int, b: int = 2) -> int:
        """Add two integers."""
        return a + b

    @tool
    def refuse(self) -> str:
        raise ToolError("not today")

    @tool
    def flaky(self) -> str:
        self.down -= 1
        if self.down >= 0:
            raise ToolUnavailable("index is down", retry_after=0.0)
        return "up"

    @tool
    def broken(self) -> str:
        raise ZeroDivisionError("oops")

    @reward
    def correct(self, task, answer) -> float:
        return float(answer == task.data["answer"])

    @metric
    def length(self, answer) -> int:
        return len(answer)

    def solution(self, task):
        return task.data["answer"]


def test_a_tool_episode_is_played_judged_and_counted():
    episode = play(Adder(), [call("add", '{"a": 3}'), say("5")])
    assert episode.result == Scored(value=1.0)
    assert episode.outcome.cause is Cause.OK
    assert episode.metrics["tool_calls"] == 1
    assert episode.metrics["length"] == 1
    assert episode.turns[1].parent == 0
    assert episode.turns[1].added == (Message(role="tool", content="5", tool_call_id="call_0_0"),)
    assert episode.answer == "5"
    assert episode.leaves() == [1]
    assert [turn.added for turn in episode.path(1)] == [turn.added for turn in episode.turns]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (call("add", '{"a": "x"}'), "bad arguments for add"),
        (call("add", "{"), "bad arguments for add"),
        (call("add", '{"a": 1, "c": 2}'), "bad arguments for add"),
        (call("subtract"), "no tool named 'subtract'"),
        (call("refuse"), "not today"),
    ],
)
def test_a_bad_call_is_a_message_to_the_policy(message, text):
    episode = play(Adder(), [message, say("5")])
    assert text in episode.turns[1].added[0].content
    assert episode.metrics["tool_errors"] == 1
    assert episode.result == Scored(value=1.0)


def test_an_unavailable_backend_costs_retries_then_the_episode_its_score_never_a_zero():
    flaky = Adder()
    flaky.down = 2
    episode = play(flaky, [call("flaky"), say("5")])
    assert episode.result == Scored(value=1.0)
    assert episode.metrics["tool_retries"] == 2
    dead = Adder()
    dead.down = 99
    episode = play(dead, [call("flaky"), say("5")])
    assert episode.outcome.cause is Cause.TOOLS
    assert isinstance(episode.result, Unscored)
    assert isinstance(episode.rewards["correct"], Unscored)


def test_a_tool_that_raises_is_an_environment_error():
    episode = play(Adder(), [call("broken")])
    assert episode.outcome.cause is Cause.ENVIRONMENT
    assert "Adder.broken raised ZeroDivisionError: oops" in episode.outcome.detail
    assert isinstance(episode.result, Unscored)


class Slow(Adder):
    @tool
    def hang(self) -> str:
        time.sleep(30)
        return ""


def test_a_hanging_tool_meets_its_deadline():
    started = time.monotonic()
    episode = play(Slow(), [call("hang")], bounds=Bounds(tool=0.2))
    assert time.monotonic() - started < 10
    assert "did not finish within 0.2 s" in episode.outcome.detail
    with pytest.raises(MissedDeadline, match="within"):
        play(Slow(), [call("hang")], bounds=Bounds(tool=0.2, strict=True))


def test_limits_are_graded():
    episode = play(Adder(), [call("add", '{"a": 1}')] * 9, bounds=Bounds(limits=Limits(turns=3)))
    assert episode.outcome.cause is Cause.LIMIT_TURNS
    assert episode.result == Scored(value=0.0)
    assert len(episode.turns) == 3


class Compacting:
    """An agent of another make: branches, resends its history without reasoning, and compacts."""

    async def run(self, task, tools, chat):
        first = await chat.reply(task.messages())
        resent = [*task.messages(), first.model_copy(update={"reasoning": None}), Message(role="user", content="go on")]
        await chat.reply(resent)
        await asyncio.gather(chat.reply(resent), chat.reply([*resent[:-1], Message(role="user", content="or so")]))
        await chat.reply([Message(role="user", content="in short: 2 + 3")])


class Echo:
    """A policy that counts and remembers the sessions it was given."""

    def __init__(self):
        self.seen, self.released = [], []

    async def reply(self, path, new, tools, sampling, session):
        await asyncio.sleep(0)
        self.seen.append((len(path), tuple(m.content for m in new), session))
        return Completion(Message(role="assistant", content=str(len(self.seen)), reasoning="hm"))

    async def release(self, session):
        self.released.append(session)


def test_a_branching_resending_compacting_agent_becomes_a_tree():
    policy = Echo()
    episode = play(Adder(), [], agent=Compacting(), policies={"main": policy})
    assert [turn.parent for turn in episode.turns] == [None, 0, 0, 0, None]
    assert episode.leaves() == [1, 2, 3, 4]
    sessions = [session for _, _, session in policy.seen]
    assert sessions[0] == sessions[1]
    assert len(set(sessions)) == 4
    assert sorted(policy.released) == sorted(set(sessions))
    assert episode.turns[0].completion.prompt_ids is None


class Tokens:
    """A token policy whose weights change while it draws, and which has one token forced on it."""

    async def reply(self, path, new, tools, sampling, session):
        generation = Generation(
            ids=np.array([7, 8, 9], np.int32),
            logprobs=np.array([-0.5, 0.0, -0.25], np.float32),
            sampled=np.array([True, False, True]),
            versions=((3, 2), (4, 1)),
            finish_reason="length",
        )
        return Completion(say("5"), np.array([1, 2], np.int32), generation, "length")

    async def release(self, session):
        pass


def test_forced_tokens_and_an_update_in_flight_are_recorded_and_a_cut_reply_is_a_limit():
    episode = play(Adder(), [], policies={"main": Tokens()})
    generation = episode.turns[0].completion.generation
    assert generation is not None
    assert generation.sampled.tolist() == [True, False, True]
    assert generation.versions == ((3, 2), (4, 1))
    assert episode.outcome.cause is Cause.LIMIT_TOKENS
    assert episode.result == Scored(value=1.0)


def test_a_generation_whose_parts_disagree_is_refused():
    with pytest.raises(ValueError, match="Generation: 2 ids"):
        Generation(np.zeros(2, np.int32), np.zeros(2, np.float32), np.ones(2, bool), ((0, 1),), "stop")


def judge_or_die(text: str) -> float:
    """The worker's side: some replies kill it."""
    if text == "bomb":
        os._exit(3)
    return float(text == "5")


class Fragile(Adder):
    sick = False

    @reward
    async def correct(self, answer):
        return await worker(judge_or_die, "bomb" if self.sick else answer, timeout=20)

    def fresh(self):
        other = super().fresh()
        other.sick = self.sick
        return other


def test_a_reply_that_kills_its_verifier_is_scored_zero_but_a_dead_verifier_is_not():
    episode = play(Fragile(), [say("bomb")])
    assert episode.outcome.cause is Cause.POLICY_CRASH
    assert episode.result == Scored(value=0.0)
    sick = Fragile()
    sick.sick = True
    episode = play(sick, [say("5")])
    assert episode.outcome.cause is Cause.VERIFIER
    assert isinstance(episode.result, Unscored)


class Unsure(Adder):
    @reward
    def correct(self, answer):
        return None if answer == "?" else float(answer)


@pytest.mark.parametrize("text", ["?", "nan", "word"])
def test_no_verdict_is_never_a_number(text):
    episode = play(Unsure(), [say(text)])
    assert isinstance(episode.result, Unscored)


class Strange(Adder):
    @reward
    def correct(self, colour):
        return 1.0


def test_a_reward_that_asks_for_an_unknown_name_is_told_what_there_is():
    episode = play(Strange(), [say("5")])
    assert "asks for colour; it may ask for" in episode.outcome.detail


class Unclosable(Adder):
    def close(self):
        raise OSError("stuck")


def test_an_error_in_close_is_recorded_and_costs_no_score():
    episode = play(Unclosable(), [say("5")])
    assert episode.result == Scored(value=1.0)
    assert "stuck" in episode.provenance["close_error"]


class Roles(Adder):
    roles = ("judge",)

    @reward
    async def correct(self, judge, answer):
        completion = await judge.reply([], [Message(role="user", content=answer)], [], Sampling(), "j")
        return float(completion.message.content)


def test_a_further_policy_is_asked_by_its_role_and_missed_by_name():
    assert play(Roles(), [], policies={"main": Replay([say("x")]), "judge": Replay([say("0.5")])}).result == Scored(
        value=0.5
    )
    with pytest.raises(KeyError, match="--role judge"):
        play(Roles(), [say("x")])


def test_a_dead_model_server_is_unscored():
    class Dead(Echo):
        async def reply(self, *args):
            raise Failure(Cause.MODEL_SERVER, "connection refused")

    episode = play(Adder(), [], policies={"main": Dead()})
    assert episode.outcome.cause is Cause.MODEL_SERVER
    assert isinstance(episode.result, Unscored)


def test_every_cause_has_a_rule_and_no_infrastructure_failure_is_graded():
    assert set(RULES) == set(Cause)
    for cause in (Cause.ENVIRONMENT, Cause.TOOLS, Cause.SANDBOX, Cause.VERIFIER, Cause.MODEL_SERVER):
        assert RULES[cause] == (2, False, False)
    assert RULES[Cause.POLICY_CRASH] == (0, True, True)


@pytest.mark.parametrize("given", ["yes", b"1", [1.0], [], {"score": 1.0}, float("nan"), object()])
@pytest.mark.parametrize("kind", [reward, metric])
def test_a_judge_that_returns_no_number_is_named_with_what_it_returned(kind, given):
    class Strange(Environment):
        @kind
        def verdict(self):
            return given

    episode = play(Strange(), [say("x")])
    if kind is metric and isinstance(given, float):
        return  # a metric may be anything that is a number
    assert episode.outcome.cause is Cause.ENVIRONMENT
    assert "Strange.verdict returned" in episode.outcome.detail
    assert f"({type(given).__name__})" in episode.outcome.detail


def test_a_judge_that_exits_ends_its_episode_alone():
    class Exits(Environment):
        @reward
        def verdict(self):
            raise SystemExit(3)

    episode = play(Exits(), [say("x")])
    assert episode.outcome.cause is Cause.ENVIRONMENT
    assert "Exits.verdict raised SystemExit: 3" in episode.outcome.detail


class LosesItsMetric(Adder):
    @reward
    def right(self, answer):
        return 1.0

    @metric
    def late(self):
        raise Failure(Cause.SANDBOX, "the box is gone")


def test_an_episode_that_lost_a_metric_to_the_machine_is_not_scored():
    episode = play(LosesItsMetric(LosesItsMetric.Config()), [say("5")])
    assert episode.outcome.cause is Cause.SANDBOX
    assert episode.result == Unscored(cause=Cause.SANDBOX, detail="the box is gone")


class Patient(Adder):
    """Needs longer than others are given, and says so."""

    needs = MappingProxyType({"setup": 5.0, "tool": 5.0, "judge": 5.0})

    def deadlines(self, task):
        return self.needs

    async def setup(self, task):
        await asyncio.sleep(0.1)

    @tool
    async def nap(self) -> str:
        """Sleep."""
        await asyncio.sleep(0.1)
        return "rested"

    @reward
    async def late(self) -> float:
        await asyncio.sleep(0.1)
        return 1.0


def test_phases_take_as_long_as_the_environment_says_that_they_need():
    tight = Bounds(setup=0.01, tool=0.01, judge=0.01)
    episode = play(Patient(), [call("nap"), say("done")], bounds=tight)
    assert (episode.outcome.cause, episode.rewards["late"]) == (Cause.OK, Scored(value=1.0))
    assert tight.at_least({"judge": 0.001}) == tight


def test_an_episode_is_over_after_all_its_deadlines():
    bounds = Bounds(limits=Limits(seconds=100), setup=10, judge=20, close=5)
    assert bounds.longest(TASK, 2) == 2 * (10 + 100 + 2 * 2 * 20 + 5) + 30
    assert bounds.at_least({"judge": 40}).longest(TASK, 2) > bounds.longest(TASK, 2)
    assert math.isinf(Bounds(limits=Limits(seconds=None)).longest(TASK, 1))


def test_a_phase_that_is_none_is_named(monkeypatch):
    monkeypatch.setattr(Patient, "needs", {"judging": 5.0})
    outcome = play(Patient(), [say("done")]).outcome
    assert outcome.cause is Cause.ENVIRONMENT
    assert "no phase 'judging'; the phases are: setup, tool, respond, judge, close" in outcome.detail
