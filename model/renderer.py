"""Conversations as token ids, each part rendered once, in the published Nemotron 3 syntax (ChatML, XML-like calls).

`start` renders the beginning of a conversation, `extend` only what follows; ids already there are never made again.
Reasoning of earlier turns stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.types import Message, ToolCall
from palaestra.model.tokenizer import (
    CALL,
    END,
    END_CALL,
    END_PARAMETER,
    END_RESULT,
    END_THINK,
    END_TOOLS,
    HEADS,
    NAMED,
    PARAMETER,
    RESULT,
    TAGS,
    THINK,
    TOOLS,
    Tokenizer,
)

Thinking = Literal["on", "off", "low"]
LOW_EFFORT = "\n{reasoning effort: low}"


class Renderer(Protocol):
    """Messages to ids and back."""

    stop_ids: tuple[int, ...]
    tag_ids: frozenset[int]

    def start(self, messages: Sequence[Message], tools: Sequence[ToolDeclaration], thinking: Thinking) -> list[int]:
        """The ids of a conversation's beginning, generation prompt included."""
        ...

    def extend(self, previous: Sequence[int], new: Sequence[Message], thinking: Thinking) -> list[int]:
        """The ids to add after `previous` (which ends with a reply): closer if it was cut, messages, next prompt."""
        ...

    def reply(self, message: Message) -> list[int]:
        """The ids of an assistant's reply as the policy would generate it, its end included."""
        ...

    def parse(self, ids: Sequence[int], tools: Sequence[ToolDeclaration] = ()) -> Message:
        """The assistant's message that generated ids spell."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...


class NemotronRenderer:
    """The renderer of our presets. `lean` declares each tool in one line; else its schema stands there in full."""

    def __init__(self, tokenizer: Tokenizer | None = None, lean: bool = True) -> None:
        self.tokenizer = tokenizer or Tokenizer.load()
        self.stop_ids: tuple[int, ...] = (self.tokenizer.id(END),)
        self.tag_ids = frozenset(map(self.tokenizer.id, TAGS))
        self._lean = lean

    def start(self, messages: Sequence[Message], tools: Sequence[ToolDeclaration], thinking: Thinking) -> list[int]:
        """The ids of a conversation's beginning, generation prompt included."""
        rest = list(messages)
        system = rest.pop(0).content if rest and rest[0].role == "system" else ""
        ids = self._system(system, tools) if system or tools else []
        return ids + self._messages(rest, thinking) + self._prompt(thinking)

    def extend(self, previous: Sequence[int], new: Sequence[Message], thinking: Thinking) -> list[int]:
        """The ids to add after `previous`: the closer if the reply was cut, the messages, the next prompt."""
        closer = [] if previous and previous[-1] == self.tokenizer.id(END) else [self.tokenizer.id(END)]
        return closer + self._text("\n") + self._messages(new, thinking) + self._prompt(thinking)

    def reply(self, message: Message) -> list[int]:
        """The ids of an assistant's reply as the policy would generate it after a prompt with thinking off."""
        reasoning = self._text(message.reasoning) + self._tags(END_THINK) if message.reasoning else []
        calls = [number for call in message.tool_calls for number in self._call(call)]
        return reasoning + self._text(message.content) + calls + self._tags(END)

    def parse(self, ids: Sequence[int], tools: Sequence[ToolDeclaration] = ()) -> Message:
        """The assistant's message that generated ids spell. A call that is cut stays text; one that is closed but
        malformed becomes a call of its raw text, which the tools answer with an error."""
        rest = list(ids)
        if rest and rest[-1] in self.stop_ids:
            rest.pop()
        reasoning, rest = self._cut(rest, END_THINK)
        content: list[int] = []
        calls: list[ToolCall] = []
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        while self.tokenizer.id(CALL) in rest:
            before, after = self._cut(rest, CALL)
            inside, left = self._cut(after, END_CALL)
            if inside is None:
                break
            content += before or []
            calls.append(self._parse_call(inside, schemas))
            rest = left
        text = self.decode(content + rest)
        return Message(
            role="assistant",
            content=text.rstrip("\n") if calls else text,
            reasoning=None if reasoning is None else self.decode(reasoning),
            tool_calls=tuple(calls),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, tags spelled out."""
        return self.tokenizer.decode(ids)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []

    def _tags(self, *tags: str) -> list[int]:
        return [self.tokenizer.id(tag) for tag in tags]

    def _system(self, text: str, tools: Sequence[ToolDeclaration]) -> list[int]:
        ids = self._tags(HEADS["system"]) + self._text(text)
        if tools:
            declared = "".join(f"{self._declare(tool['function'])}\n" for tool in tools)
            ids += self._text("\n\n" if text else "") + self._tags(TOOLS) + self._text(declared) + self._tags(END_TOOLS)
        return ids + self._tags(END) + self._text("\n")

    def _declare(self, function: dict[str, Any]) -> str:
        if not self._lean:
            return json.dumps(function, ensure_ascii=False)
        names = ", ".join(function["parameters"].get("properties", {}))
        return f"{function['name']}({names})"

    def _messages(self, messages: Sequence[Message], thinking: Thinking) -> list[int]:
        ids: list[int] = []
        for place, message in enumerate(messages):
            if message.role == "assistant":
                think = self._tags(THINK) if message.reasoning else self._tags(THINK, END_THINK)
                ids += self._tags(HEADS["assistant"]) + think + self.reply(message) + self._text("\n")
            elif message.role == "tool":
                first = place == 0 or messages[place - 1].role != "tool"
                last = place + 1 == len(messages) or messages[place + 1].role != "tool"
                ids += self._tool_result(message.content, first, last)
            else:
                effort = LOW_EFFORT if thinking == "low" and message.role == "user" else ""
                ids += self._tags(HEADS[message.role]) + self._text(message.content + effort)
                ids += self._tags(END) + self._text("\n")
        return ids

    def _tool_result(self, content: str, first: bool, last: bool) -> list[int]:
        """Results that follow each other share one user message."""
        head = self._tags(HEADS["user"]) if first else self._text("\n")
        tail = self._tags(END) + self._text("\n") if last else []
        return head + self._tags(RESULT) + self._text(content) + self._tags(END_RESULT) + tail

    def _prompt(self, thinking: Thinking) -> list[int]:
        return self._tags(HEADS["assistant"], THINK, *((END_THINK,) if thinking == "off" else ()))

    def _call(self, call: ToolCall) -> list[int]:
        ids = self._tags(CALL) + self._text(call.name) + self._tags(NAMED)
        for name, value in json.loads(call.arguments or "{}").items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            ids += self._tags(PARAMETER) + self._text(name) + self._tags(NAMED) + self._text(text)
            ids += self._tags(END_PARAMETER)
        return ids + self._tags(END_CALL)

    def _cut(self, ids: list[int], tag: str) -> tuple[list[int] | None, list[int]]:
        """What stands before the first `tag`, and what stands after it; (None, ids) where there is none."""
        number = self.tokenizer.id(tag)
        if number not in ids:
            return None, ids
        at = ids.index(number)
        return ids[:at], ids[at + 1 :]

    def _parse_call(self, ids: list[int], schemas: dict[str, Any]) -> ToolCall:
        name, rest = self._cut(ids, NAMED)
        raw = self.decode(ids)
        if name is None:
            return ToolCall(id="", name=raw, arguments="")
        types = schemas.get(self.decode(name), {}).get("properties", {})
        arguments: dict[str, Any] = {}
        while rest:
            before, rest = self._cut(rest, PARAMETER)
            key, rest = self._cut(rest, NAMED)
            value, rest = self._cut(rest, END_PARAMETER)
            if before is None or before or key is None or value is None:
                return ToolCall(id="", name=self.decode(name), arguments=raw)
            parameter = self.decode(key)
            arguments[parameter] = _typed(self.decode(value), types.get(parameter, {}))
        return ToolCall(id="", name=self.decode(name), arguments=json.dumps(arguments, ensure_ascii=False))


def _typed(text: str, schema: dict[str, Any]) -> Any:
    """A parameter's value: text where its schema says string or nothing, else the JSON it spells, else text."""
    if schema.get("type", "string") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
