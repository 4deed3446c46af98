"""The one JSON schema that endpoints, recorded replies and result files speak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from palaestra.gym.types import (
    SCHEMA_VERSION,
    Completion,
    Episode,
    Message,
    Record,
    Reward,
    Scored,
    Task,
    ToolCall,
    Unscored,
)

_KNOWN = {"role", "content", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "refusal", "name"}


def message_to_json(message: Message) -> dict[str, Any]:
    """A message in the OpenAI chat form. Provider data goes back as it came; reasoning is not sent."""
    out: dict[str, Any] = {**(message.provider_data or {}), "role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out


def message_from_json(value: object) -> Message:
    """A message from the OpenAI chat form; unknown fields are kept as provider data.

    Raises ValueError naming what is wrong.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a message must be an object, not {type(value).__name__}")
    extra = {key: item for key, item in value.items() if key not in _KNOWN and item is not None}
    return Message(
        role=value.get("role", "assistant"),
        content=_text(value.get("content")),
        reasoning=value.get("reasoning_content") or value.get("reasoning") or None,
        tool_calls=tuple(_call(call) for call in value.get("tool_calls") or ()),
        tool_call_id=value.get("tool_call_id"),
        provider_data=extra or None,
    )


def _text(content: object) -> str:
    """Content as text: a string, nothing, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _clean(content)
    if isinstance(content, Sequence):
        return _clean("".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping)))
    raise ValueError(f"a message's content must be text, not {type(content).__name__}")


def _clean(text: str) -> str:
    """The text without lone surrogates, which no UTF-8 file could hold."""
    return text.encode("utf-8", "replace").decode()


def _call(value: object) -> ToolCall:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'a tool call must look like {{"id", "function": {{"name", "arguments"}}}}, not {str(value)[:200]}'
        )
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(id=str(value.get("id") or ""), name=_clean(function["name"]), arguments=_clean(text))


class Judged(Record):
    """How a reply was judged: one line that `env score` writes. `reward` is null where there is none."""

    key: str
    reward: float | None
    rewards: dict[str, float | None]
    outcome: str
    detail: str = ""
    schema_version: int = SCHEMA_VERSION


def number(reward: Reward | tuple[Scored, ...]) -> float | None:
    """A reward as a number (its turns' sum), None where it is unscored."""
    if isinstance(reward, Unscored):
        return None
    return reward.value if isinstance(reward, Scored) else sum(part.value for part in reward)


def judged(episode: Episode) -> Judged:
    """The judgement of an episode."""
    detail = episode.outcome.detail or (episode.result.detail if isinstance(episode.result, Unscored) else "")
    return Judged(
        key=episode.task.key,
        reward=number(episode.result),
        rewards={name: number(reward) for name, reward in episode.rewards.items()},
        outcome=episode.outcome.cause.value,
        detail=detail,
    )


def transcript(episode: Episode) -> list[dict[str, Any]]:
    """The main conversation, in the OpenAI form: the path to the last leaf, reasoning included."""
    leaves = [leaf for leaf in episode.leaves() if episode.turns[leaf].agent == "main"]
    if not leaves:
        return [message_to_json(message) for message in episode.task.messages()]
    messages: list[Message] = []
    for turn in episode.path(leaves[-1]):
        messages += [*turn.added, turn.completion.message]
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: Message) -> dict[str, Any]:
    reasoning = {"reasoning": message.reasoning} if message.reasoning else {}
    return {**message_to_json(message), **reasoning}


def flat(episode: Episode) -> dict[str, Any]:
    """An episode as one row of a table: who was asked what, how it went, the main conversation in the OpenAI form."""
    verdict = judged(episode)
    usage = [_usage(turn.completion) for turn in episode.turns]
    return {
        "environment": episode.task.environment,
        "key": episode.task.key,
        "difficulty": episode.task.difficulty,
        "reward": verdict.reward,
        "rewards": verdict.rewards,
        "metrics": {name: float(value) for name, value in episode.metrics.items()},
        "outcome": verdict.outcome,
        "detail": verdict.detail,
        "prompt_tokens": sum(before for before, _ in usage),
        "completion_tokens": sum(drawn for _, drawn in usage),
        "seconds": episode.timings.get("total", 0.0),
        "messages": transcript(episode),
    }


def _usage(completion: Completion) -> tuple[int, int]:
    """Prompt and completion tokens of one reply: by ids where they are known, else as the endpoint counts."""
    if completion.generation is not None and completion.prompt_ids is not None:
        return len(completion.prompt_ids), len(completion.generation.ids)
    return completion.usage.get("prompt_tokens", 0), completion.usage.get("completion_tokens", 0)


def task_sha256(task: Task) -> str:
    """The hash of everything that a task holds, but for the name its environment has in this run."""
    return hashlib.sha256(task.model_copy(update={"environment": ""}).model_dump_json().encode()).hexdigest()
