"""Policies that need no model of ours: gold, null, human, and any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from palaestra.gym import threads
from palaestra.gym.environment import Environment, gold_of
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policy import Policy, Replay, ToolDeclaration
from palaestra.gym.registry import UsageError, one_line, points, suggest
from palaestra.gym.types import Completion, FinishReason, Message, Sampling, Task, ToolCall, Turn
from palaestra.gym.wire import message_from_json, message_to_json

if TYPE_CHECKING:
    import httpx

POLICIES = "palaestra.policies"
ATTEMPTS = 5
LONGEST_PAUSE = 30.0
DEFAULT_URL = "https://api.openai.com/v1"


class Null:
    """Replies with nothing."""

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """An empty message."""
        return Completion(Message(role="assistant"))

    async def release(self, session: str) -> None:
        """Nothing is cached."""


class Gold(Null):
    """Plays an environment's `solution(task)`. It must be bound to an episode's environment and task."""

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """Raises Failure(ENVIRONMENT): gold is known only for a task."""
        raise Failure(Cause.ENVIRONMENT, "scripted:gold can only play an environment that has a solution(task)")

    def bind(self, environment: Environment, task: Task) -> Policy:
        """The policy that plays this task's solution; itself where there is none. Raises UsageError."""
        gold = gold_of(environment, task)
        return self if gold is None else Replay(gold)


def bound(policy: Policy, environment: Environment, task: Task) -> Policy:
    """The policy for one episode: a scripted one learns its task here, any other is returned as it is."""
    bind = getattr(policy, "bind", None)
    return policy if bind is None else bind(environment, task)


class Human(Null):
    """Asks at the terminal. A line `/tool {"argument": 1}` calls a tool; any other line is the reply."""

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """What was typed. Raises Failure(CANCELLED) at the end of the input."""
        for message in new:
            print(f"[{message.role}] {message.content}")
        for tool in tools:
            declared = tool["function"]
            keys = ", ".join(declared["parameters"].get("properties", {}))
            print(f"  /{declared['name']} {{{keys}}}: {declared['description']}")
        try:
            line = await threads.call(input, "> ")
        except EOFError as error:
            raise Failure(Cause.CANCELLED, "the terminal's input ended") from error
        return Completion(_typed(line))


def _typed(line: str) -> Message:
    if not line.startswith("/"):
        return Message(role="assistant", content=line)
    name, _, arguments = line[1:].partition(" ")
    call = ToolCall(id="", name=name, arguments=arguments.strip() or "{}")
    return Message(role="assistant", tool_calls=(call,))


class _Busy(Exception):
    """The endpoint did not answer properly, and may later. `pause`: seconds that it asked for."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


class OpenAI(Null):
    """A model behind an OpenAI-compatible chat endpoint.

    The key is read from PALAESTRA_API_KEY, else OPENAI_API_KEY, when a request is made; it is never stored. Busy
    answers (408, 409, 429, 5xx, a broken connection, a malformed body) are retried with growing pauses. `timeout` is in
    seconds, for each request.
    """

    def __init__(self, model: str, url: str, timeout: float = 300.0, pause: float = 0.5) -> None:
        self.model = model
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._pause = pause
        self._client: httpx.AsyncClient | None = None

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """The endpoint's reply. Raises Failure(MODEL_SERVER) or Failure(LIMIT_CONTEXT)."""
        body = self._body([*_conversation(path), *new], tools, sampling)
        for attempt in range(ATTEMPTS):
            try:
                return await self._ask(body)
            except _Busy as busy:
                last = busy
            if attempt < ATTEMPTS - 1:
                pause = self._pause * 2**attempt if last.pause is None else last.pause
                await asyncio.sleep(min(pause, LONGEST_PAUSE))
        raise Failure(Cause.MODEL_SERVER, f"{self.url} failed {ATTEMPTS} times; last: {last}")

    async def aclose(self) -> None:
        """Close the connections. The next reply opens new ones."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _body(
        self, messages: Sequence[Message], tools: Sequence[ToolDeclaration], sampling: Sampling
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message_to_json(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop"):
            value = getattr(sampling, name)
            if value != Sampling.model_fields[name].default:
                body[name] = value
        if sampling.json_schema is not None:
            schema = {"name": "reply", "schema": sampling.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | ({"tools": list(tools)} if tools else {})

    async def _ask(self, body: Mapping[str, Any]) -> Completion:
        import httpx

        if self._client is None:
            local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
            limits = httpx.Limits(max_connections=None)
            self._client = httpx.AsyncClient(timeout=self._timeout, trust_env=not local, limits=limits)
        key = os.environ.get("PALAESTRA_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = await self._client.post(f"{self.url}/chat/completions", json=body, headers=headers)
        except httpx.TransportError as error:
            raise _Busy(f"no answer ({one_line(error)}); is the server up?") from error
        except httpx.InvalidURL as error:
            raise Failure(Cause.MODEL_SERVER, f"{self.url} is no URL: {error}") from error
        return self._read(response)

    def _read(self, response: httpx.Response) -> Completion:
        status, text = response.status_code, " ".join(response.text.split())[:300]
        if status in (408, 409, 429) or status >= 500:
            raise _Busy(f"HTTP {status}: {text}", _retry_after(response.headers.get("retry-after")))
        if status == 400 and "context" in text.lower() and ("length" in text.lower() or "window" in text.lower()):
            raise Failure(Cause.LIMIT_CONTEXT, f"{self.model}: {text}")
        if status != 200:
            raise Failure(Cause.MODEL_SERVER, f"{self.url} refused the request, HTTP {status}: {text}")
        try:
            return _completion(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Busy(f"malformed body ({one_line(error)}): {text[:120]}") from error


def _conversation(path: Sequence[Turn]) -> list[Message]:
    return [message for turn in path for message in (*turn.added, turn.completion.message)]


def _retry_after(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None


def _completion(body: Mapping[str, Any]) -> Completion:
    choice = body["choices"][0]
    message = message_from_json({**choice["message"], "role": "assistant"})
    usage = body.get("usage") or {}
    counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    reasons: dict[str, FinishReason] = {"length": "length", "tool_calls": "tool_calls"}
    return Completion(message, finish_reason=reasons.get(choice.get("finish_reason"), "stop"), usage=counts)


def _scripted(argument: str) -> Policy:
    if argument != "gold":
        raise UsageError(f"policy scripted:{argument}: {suggest(argument, ['gold'])}")
    return Gold()


def _openai(argument: str) -> Policy:
    model, _, url = argument.rpartition("@") if "://" in argument else (argument, "", "")
    if not model:
        raise UsageError("policy openai: write openai:MODEL@URL, such as openai:my-model@http://localhost:8000/v1")
    return OpenAI(model, url or os.environ.get("OPENAI_BASE_URL", DEFAULT_URL))


_BUILT_IN = {"scripted": _scripted, "null": lambda _: Null(), "human": lambda _: Human(), "openai": _openai}


def build(ref: str) -> Policy:
    """The policy of a reference: scripted:gold, null, human, openai:MODEL@URL, or an installed prefix such as model:.

    An installed one is a callable of the text after the prefix. Raises UsageError naming the reference and the fix.
    """
    prefix, _, argument = ref.partition(":")
    if prefix in _BUILT_IN:
        return _BUILT_IN[prefix](argument)
    installed = points(POLICIES)
    if prefix not in installed:
        raise UsageError(f"unknown policy {ref!r}: {suggest(prefix, [*_BUILT_IN, *installed])}")
    try:
        factory = installed[prefix].load()
    except ImportError as error:
        raise UsageError(
            f"policy {prefix}: needs what is not installed ({error}); pip install 'palaestra[hf]'"
        ) from error
    policy: Policy = factory(argument)
    return policy


async def shut(policies: Sequence[Policy]) -> None:
    """Close the policies that hold connections or engines."""
    for policy in policies:
        close = getattr(policy, "aclose", None)
        if close is not None:
            await close()


def roles(pairs: Sequence[str]) -> dict[str, Policy]:
    """Further policies from `ROLE=POLICY` texts. Raises UsageError."""
    named: dict[str, Policy] = {}
    for pair in pairs:
        role, equals, ref = pair.partition("=")
        if not equals or not role or not ref:
            raise UsageError(f"--role {pair}: write ROLE=POLICY, such as user=openai:MODEL@URL")
        named[role] = build(ref)
    return named
