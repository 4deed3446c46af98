"""Conversations of foreign models as token ids, by their own chat templates.

The template renders the first prompt. What follows is never rendered together with what is there: `extend` tokenises
only the text that the template adds when the new messages follow a short stand-in conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Message, ToolCall
from palaestra.model.renderer import Thinking

QUESTION, REPLY = "A stand-in for the question.", "A stand-in for the reply."
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"^\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
TOOLS_TEXT = """{system}You may call these functions, given as JSON:
{declared}
To call one, reply with a line
<tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call>"""


class TemplateRenderer:
    """The renderer of a tokenizer that has a chat template. Calls are read in the Hermes form, a JSON object between
    <tool_call> tags; templates that know nothing of tools get them declared in the system message. Raises
    UsageError where the tokenizer has not one template and an eos token."""

    def __init__(self, tokenizer: Any) -> None:
        _refuse_unusable(tokenizer)
        self._tokenizer = tokenizer
        self._knows_tools = "tools" in tokenizer.chat_template
        self.tag_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        self._ends = self._reply_ends() or [tokenizer.eos_token_id]
        self.stop_ids: tuple[int, ...] = tuple(sorted({tokenizer.eos_token_id, *self._ends}))

    def start(self, messages: Sequence[Message], tools: Sequence[ToolDeclaration], thinking: Thinking) -> list[int]:
        """The ids of a conversation's beginning, generation prompt included."""
        shown = self._plain(messages)
        if tools and not self._knows_tools:
            shown = _with_tools(shown, tools)
        return self._ids(self._render(shown, list(tools) if self._knows_tools else None, True, thinking))

    def extend(self, previous: Sequence[int], new: Sequence[Message], thinking: Thinking) -> list[int]:
        """The ids to add after `previous`: what ends a reply, the messages, the next prompt."""
        whole = self._render([*self._stand_in(new), *self._plain(new)], None, True, thinking)
        closer = self._closer()
        at = whole.find(closer, whole.find(REPLY) + len(REPLY))
        if at < 0:
            raise ValueError(f"the chat template ends the last reply with {closer!r}, earlier ones with something else")
        ids = self._ids(whole[at:])
        return ids[1:] if previous and previous[-1] in self.stop_ids and ids[0] in self.stop_ids else ids

    def reply(self, message: Message) -> list[int]:
        """The ids of an assistant's reply as the policy would generate it, its end included."""
        return self._ids(_as_text(message)["content"]) + self._ends

    def parse(self, ids: Sequence[int], tools: Sequence[ToolDeclaration] = ()) -> Message:
        """The assistant's message that generated ids spell. A malformed call becomes a call of its raw text, which the
        tools answer with an error."""
        rest = list(ids)
        while rest and rest[-1] in self.stop_ids:
            rest.pop()
        text = self.decode(rest)
        thought = THOUGHT.match(text)
        text = text[thought.end() :] if thought else text
        calls = tuple(_call(found) for found in CALL.findall(text))
        return Message(
            role="assistant",
            content=CALL.sub("", text).strip(),
            reasoning=thought.group(1).strip() if thought else None,
            tool_calls=calls,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool, thinking: Thinking) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=prompt,
                tokenize=False,
                enable_thinking=thinking != "off",
            )
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _closer(self) -> str:
        """What the template writes after a reply."""
        rendered = self._render(_stand_in_talk(), None, False, "off")
        return rendered[rendered.rindex(REPLY) + len(REPLY) :]

    def _reply_ends(self) -> list[int]:
        """The special token that the template closes a reply with, where it does."""
        first = self._ids(self._closer())[:1]
        return [number for number in first if number in self.tag_ids]

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The OpenAI form; for a template without tools, results and calls as text."""
        return [_as_chat(message) if self._knows_tools else _as_text(message) for message in messages]

    def _stand_in(self, new: Sequence[Message]) -> list[dict[str, Any]]:
        """A conversation that the new messages may follow."""
        talk = _stand_in_talk()
        if new and new[0].role == "tool" and self._knows_tools:
            calls = tuple(ToolCall(id=m.tool_call_id or "", name="f", arguments="{}") for m in new if m.role == "tool")
            talk[-1] = _as_chat(Message(role="assistant", content=REPLY, tool_calls=calls))
        return talk


def _refuse_unusable(tokenizer: Any) -> None:
    template, where = tokenizer.chat_template, f"transformers:{tokenizer.name_or_path}: its tokenizer has"
    if not template:
        raise UsageError(f"{where} no chat template; take a chat model, or add its template as chat_template.jinja")
    if not isinstance(template, str):
        names = ", ".join(template)
        raise UsageError(f"{where} several chat templates ({names}); leave one in the folder, as chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{where} no eos token, so replies would not end; set eos_token in tokenizer_config.json")


def _stand_in_talk() -> list[dict[str, Any]]:
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[ToolDeclaration]) -> list[dict[str, Any]]:
    """The tools declared in the system message."""
    system = messages[0]["content"] + "\n\n" if messages and messages[0]["role"] == "system" else ""
    rest = messages[1:] if system else messages
    declared = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return [{"role": "system", "content": TOOLS_TEXT.format(system=system, declared=declared)}, *rest]


def _as_chat(message: Message) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        chat["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.role == "tool":
        chat["tool_call_id"] = message.tool_call_id
    return chat


def _as_text(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = "".join(
        f"\n<tool_call>{json.dumps({'name': c.name, 'arguments': _object(c.arguments)})}</tool_call>"
        for c in message.tool_calls
    )
    return {"role": message.role, "content": (message.content + calls).strip()}


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _call(text: str) -> ToolCall:
    try:
        read = json.loads(text)
        name, arguments = read["name"], read.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        return ToolCall(id="", name=text[:80], arguments="")
    return ToolCall(id="", name=str(name), arguments=json.dumps(arguments, ensure_ascii=False))
