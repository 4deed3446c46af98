"""Policies without a model of ours, and the OpenAI one against a server on loopback."""

from __future__ import annotations

import asyncio

import pytest
from loopback import Server, in_turn

from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment, reward, tool
from palaestra.gym.episode import run_episode
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policies import ATTEMPTS, Gold, Human, Null, OpenAI, bound, build, roles
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Message, Sampling, Scored, Task, ToolCall, Unscored

TASK = Task(key="sum", prompt="2 + 3 = ?", data={"answer": "5"})


class Adder(Environment):
    """Answer a sum."""

    @tool
    def add(self, a: int, b: int) -> int:
        """Add two integers."""
        return a + b

    @reward
    def correct(self, task, answer) -> float:
        return float(answer == task.data["answer"])

    def solution(self, task):
        return task.data["answer"]


def say(text: str, **more) -> dict:
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def call(name: str, arguments: str) -> dict:
    calls = [{"id": "abc", "type": "function", "function": {"name": name, "arguments": arguments}}]
    body = say("", tool_calls=calls, reasoning_content="let me add", signature="opaque")
    body["choices"][0]["finish_reason"] = "tool_calls"
    return body


def serve(*replies) -> Server:
    """An endpoint that gives these replies in turn."""
    return Server(in_turn(replies))


def ok(body) -> tuple:
    return 200, {}, body


async def play(policy, task=TASK):
    try:
        return await run_episode(Adder(), Loop(), {"main": policy}, task, Sampling(temperature=0.5, stop=("x",)), "e")
    finally:
        await policy.aclose()


async def ask(policy, sampling=None):
    try:
        return await policy.reply([], TASK.messages(), [], sampling or Sampling(), "s")
    finally:
        await policy.aclose()


async def test_a_tool_episode_over_http_sends_the_history_back_untouched():
    with serve(ok(call("add", '{"a": 2, "b": 3}')), ok(say("5"))) as server:
        episode = await play(OpenAI("m", server.url))
    assert episode.result == Scored(value=1.0)
    first, second = server.requests
    assert first["model"] == "m"
    assert first["temperature"] == 0.5
    assert first["stop"] == ["x"]
    assert "top_p" not in first
    assert first["tools"][0]["function"]["name"] == "add"
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][1]["tool_calls"][0]["id"] == "abc"
    assert second["messages"][1]["signature"] == "opaque"
    assert second["messages"][2] == {"role": "tool", "content": "5", "tool_call_id": "abc"}
    assert episode.turns[0].completion.message.reasoning == "let me add"
    assert episode.turns[0].completion.usage == {"prompt_tokens": 7, "completion_tokens": 3}


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_server_is_asked_again(status):
    with serve((status, {"Retry-After": "0"}, b"busy"), ok(say("5"))) as server:
        completion = await ask(OpenAI("m", server.url, pause=60))
    assert completion.message.content == "5"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 5}}]}', b"\xff"]
)
async def test_a_malformed_body_is_retried_and_then_a_model_server_failure(body):
    with serve(ok(body)) as server, pytest.raises(Failure, match="malformed body") as caught:
        await ask(OpenAI("m", server.url, pause=0))
    assert caught.value.cause is Cause.MODEL_SERVER
    assert len(server.requests) == ATTEMPTS


async def test_an_episode_whose_server_is_down_is_unscored():
    with serve(ok(say(""))) as server:
        url = server.url
    episode = await play(OpenAI("m", url, pause=0))
    assert episode.outcome.cause is Cause.MODEL_SERVER
    assert isinstance(episode.result, Unscored)
    assert "is the server up?" in episode.outcome.detail


@pytest.mark.parametrize(
    ("status", "text", "cause"),
    [
        (400, "maximum context length is 4096 tokens", Cause.LIMIT_CONTEXT),
        (400, "bad temperature", Cause.MODEL_SERVER),
        (401, "no key", Cause.MODEL_SERVER),
    ],
)
async def test_a_refusal_is_not_retried(status, text, cause):
    with serve((status, {}, {"error": {"message": text}})) as server, pytest.raises(Failure) as caught:
        await ask(OpenAI("m", server.url))
    assert caught.value.cause is cause
    assert text in caught.value.detail
    assert len(server.requests) == 1


async def test_the_key_comes_from_the_environment_and_a_cut_reply_is_marked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    body = say("long")
    body["choices"][0]["finish_reason"] = "length"
    schema = {"type": "object"}
    with serve(ok(body)) as server:
        completion = await ask(OpenAI("m", server.url), Sampling(json_schema=schema, seed=4, top_p=0.9))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert completion.finish_reason == "length"
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == schema
    assert (server.requests[0]["seed"], server.requests[0]["top_p"]) == (4, 0.9)


async def test_a_lone_surrogate_in_a_reply_can_be_written():
    with serve(ok(b'{"choices": [{"message": {"content": "a\\ud800b"}}]}')) as server:
        completion = await ask(OpenAI("m", server.url))
    assert completion.message.content == "a?b"


async def test_gold_plays_the_solution_once_bound_and_fails_unbound():
    policy = bound(build("scripted:gold"), Adder(), TASK)
    episode = await run_episode(Adder(), Loop(), {"main": policy}, TASK, Sampling(), "e")
    assert episode.result == Scored(value=1.0)
    unbound = bound(Gold(), Environment(), TASK)
    episode = await run_episode(Adder(), Loop(), {"main": unbound}, TASK, Sampling(), "e")
    assert episode.outcome.cause is Cause.ENVIRONMENT
    assert "solution" in episode.outcome.detail


async def test_null_replies_with_nothing():
    assert (await Null().reply([], [], [], Sampling(), "s")).message == Message(role="assistant")


async def test_a_human_types_replies_and_tool_calls(monkeypatch, capsys):
    typed = iter(['/add {"a": 2, "b": 3}', "5"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    episode = await run_episode(Adder(), Loop(), {"main": Human()}, TASK, Sampling(), "e")
    assert episode.result == Scored(value=1.0)
    assert episode.turns[0].completion.message.tool_calls == (
        ToolCall(id="call_0_0", name="add", arguments='{"a": 2, "b": 3}'),
    )
    assert "2 + 3 = ?" in capsys.readouterr().out


async def test_the_end_of_the_terminals_input_cancels(monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    with pytest.raises(Failure) as caught:
        await Human().reply([], [], [], Sampling(), "s")
    assert caught.value.cause is Cause.CANCELLED


def test_references_build_policies(monkeypatch):
    policy = build("openai:org/model@v2@http://localhost:1/v1/")
    assert (policy.model, policy.url) == ("org/model@v2", "http://localhost:1/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:2")
    assert build("openai:m").url == "http://localhost:2"
    assert isinstance(build("null"), Null)
    assert isinstance(build("human"), Human)
    assert list(roles(["user=null"])) == ["user"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: build("opnai:m"), "did you mean 'openai'"),
        (lambda: build("scripted:silver"), "known: gold"),
        (lambda: build("openai:"), "openai:MODEL@URL"),
        (lambda: roles(["user"]), "ROLE=POLICY"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(make, text):
    with pytest.raises(UsageError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_connection_serves_many_event_loops_in_turn():
    with serve(ok(say("5"))) as server:
        policy = OpenAI("m", server.url)
        for _ in range(2):
            assert asyncio.run(ask(policy)).message.content == "5"
