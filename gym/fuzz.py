"""Replies and tool arguments that no policy should send, for `env check`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.types import Message, ToolCall

MALFORMED = (
    "",
    " \n\t",
    "<tool_call>",
    "</think></think>",
    '{"name": "x", "arguments": ',
    "\\boxed{",
    "```python\n",
    "\x00\x1b[31m\u202e",
    "0" * 20_000,
    "((((((((((" * 500,
    "nan",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * 50,
)
_STRINGS = ("", "a", "0", "-1", "\n", "../../etc/passwd", "'; --", "{" * 200, "é" * 300, "\x00", "9" * 400, "(" * 300)
_NUMBERS = (0, 1, -1, 7, 2**31, -(2**63), 10**30)
_FLOATS = (0.0, -0.5, 1e308, -1e-308, 3.0)
_WRONG = ("{", "[]", "null", '"text"', "{}", '{"no_such_argument": 1}', '{"a": NaN}', "")


def broken_calls(tools: Sequence[ToolDeclaration]) -> Iterator[Message]:
    """Replies whose tool calls cannot be run: an unknown tool, arguments that are no JSON or of the wrong shape."""
    yield _call("no_such_tool", "{}")
    for tool in tools:
        for arguments in _WRONG:
            yield _call(tool["function"]["name"], arguments)


def valid_calls(tool: ToolDeclaration, count: int, seed: int) -> Iterator[Message]:
    """Calls whose arguments fit the declared schema and are otherwise arbitrary."""
    draw = random.Random(seed)
    declared = tool["function"]
    for _ in range(count):
        yield _call(declared["name"], json.dumps(_value(declared["parameters"], declared["parameters"], draw)))


def _call(name: str, arguments: str) -> Message:
    return Message(role="assistant", tool_calls=(ToolCall(id="", name=name, arguments=arguments),))


def _value(schema: dict[str, Any], root: dict[str, Any], draw: random.Random) -> Any:
    """A value that fits `schema`, for the JSON-schema forms that type hints lead to."""
    if "$ref" in schema:
        return _value(root["$defs"][schema["$ref"].rpartition("/")[2]], root, draw)
    for choice in ("enum", "examples"):
        if schema.get(choice):
            return draw.choice(schema[choice])
    if "const" in schema:
        return schema["const"]
    if "anyOf" in schema:
        return _value(draw.choice(schema["anyOf"]), root, draw)
    return _of_type(schema, root, draw)


def _of_type(schema: dict[str, Any], root: dict[str, Any], draw: random.Random) -> Any:
    match schema.get("type"):
        case "object":
            required = set(schema.get("required", ()))
            fields = schema.get("properties", {}).items()
            return {name: _value(own, root, draw) for name, own in fields if name in required or draw.random() < 0.5}
        case "array":
            length = draw.randint(schema.get("minItems", 0), schema.get("minItems", 0) + 2)
            return [_value(schema.get("items", {}), root, draw) for _ in range(length)]
        case "integer":
            return int(_within(schema, draw.choice(_NUMBERS)))
        case "number":
            return _within(schema, draw.choice((*_NUMBERS, *_FLOATS)))
        case "boolean":
            return draw.random() < 0.5
        case "null":
            return None
        case _:
            return draw.choice(_STRINGS)[: schema.get("maxLength")].ljust(schema.get("minLength", 0), "x")


def _within(schema: dict[str, Any], number: float) -> float:
    low: float = schema.get("minimum", schema.get("exclusiveMinimum", number - 1) + 1)
    high: float = schema.get("maximum", schema.get("exclusiveMaximum", number + 1) - 1)
    return max(low, min(high, number))
