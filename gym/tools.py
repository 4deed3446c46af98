"""Tools: methods of an environment that the policy may call."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from palaestra.gym import threads
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.types import Message, ToolCall

if TYPE_CHECKING:
    from palaestra.gym.environment import Environment

F = TypeVar("F", bound=Callable[..., Any])

UNAVAILABLE_RETRIES = 5
LONGEST_PAUSE = 30.0


class ToolError(Exception):
    """Raised by a tool for a bad call: the text goes to the policy, and the episode goes on."""


class ToolUnavailable(Exception):
    """Raised by a tool whose backend is down: the call is tried again after `retry_after` seconds, then the episode
    ends unscored (tool infrastructure)."""

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class ToolSpec(NamedTuple):
    """A tool as declared: the method behind it, the model of its arguments, its OpenAI declaration, and whether a call
    that succeeds ends the episode."""

    method: str
    arguments: type[BaseModel]
    declaration: ToolDeclaration
    ends: bool = False


@overload
def tool(function: F) -> F: ...
@overload
def tool(*, name: str = "", ends: bool = False) -> Callable[[F], F]: ...
def tool(function: F | None = None, *, name: str = "", ends: bool = False) -> F | Callable[[F], F]:
    """Make a method a tool. Its parameters' types and its docstring become the declaration; `name`, where the tool is
    not to be called as the method is; `ends`: a call that succeeds is the episode's last."""

    def mark(function: F) -> F:
        function.__palaestra_tool__ = name or function.__name__  # type: ignore[attr-defined]
        function.__palaestra_ends__ = ends  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def _arguments_model(function: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"tool {function.__qualname__}: *{name} cannot be declared; name each parameter")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, str), default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _spec(function: Callable[..., Any]) -> ToolSpec:
    model = _arguments_model(function)
    parameters = model.model_json_schema()
    parameters.pop("title", None)
    for field in parameters.get("properties", {}).values():
        field.pop("title", None)
    name = function.__palaestra_tool__  # type: ignore[attr-defined]
    described = {"name": name, "description": inspect.getdoc(function) or "", "parameters": parameters}
    ends = bool(getattr(function, "__palaestra_ends__", False))
    return ToolSpec(function.__name__, model, {"type": "function", "function": described}, ends)


_specs: dict[type, dict[str, ToolSpec]] = {}


def specs(environment: type[Environment]) -> dict[str, ToolSpec]:
    """The tools of an environment class by name, in the order of their definition, base classes first."""
    if environment in _specs:
        return _specs[environment]
    found: dict[str, ToolSpec] = {}
    for base in reversed(environment.__mro__):
        for member in vars(base).values():
            if hasattr(member, "__palaestra_tool__"):
                found[member.__palaestra_tool__] = _spec(member)
    return _specs.setdefault(environment, found)


def undeclared(environment: type[Environment]) -> list[str]:
    """What the tools of an environment class leave unsaid to the policy: a line for each untyped parameter and each
    missing docstring, with the fix."""
    lines: list[str] = []
    for name, spec in specs(environment).items():
        parameters = list(inspect.signature(getattr(environment, spec.method)).parameters.values())[1:]
        bare = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
        lines += [f"the tool {name}: its parameter {one} has no type; annotate it ({one}: str)" for one in bare]
        if not spec.declaration["function"]["description"]:
            lines.append(f"the tool {name} has no docstring; write one: the policy is shown it")
    return lines


def _complaint(error: ValidationError) -> str:
    parts = (f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors(include_url=False))
    return "; ".join(parts)


def as_text(value: object) -> str:
    """A tool's result as the text that the policy reads."""
    if isinstance(value, str):
        return value
    return json.dumps(value.model_dump() if isinstance(value, BaseModel) else value, ensure_ascii=False, default=str)


class Tools:
    """The tools of one episode: what an agent holds of the environment."""

    def __init__(self, environment: Environment, tool_seconds: float, respond_seconds: float) -> None:
        self._environment = environment
        self._specs = specs(type(environment))
        self.tool_seconds = tool_seconds
        self.respond_seconds = respond_seconds
        self.calls = 0
        self.errors = 0
        self.retries = 0
        self.seconds = 0.0
        self.over = False

    @property
    def declarations(self) -> list[ToolDeclaration]:
        """What the policy is told of the tools."""
        allowed = self._environment.tool_names()
        return [spec.declaration for name, spec in self._specs.items() if name in allowed]

    async def call(self, call: ToolCall) -> Message:
        """Run one call. A bad call, or a ToolError, becomes a message to the policy.

        Raises Failure(TOOLS) when the backend stays unavailable, Failure(ENVIRONMENT) when the tool hangs or raises.
        """
        self.calls += 1
        started = asyncio.get_running_loop().time()
        try:
            content = as_text(await self._run(call))
            self.over = self.over or self._specs[call.name].ends
        except ToolError as error:
            self.errors += 1
            content = f"Error: {error}"
        finally:
            self.seconds += asyncio.get_running_loop().time() - started
        return Message(role="tool", content=content, tool_call_id=call.id)

    async def respond(self, message: Message) -> list[Message] | None:
        """The environment's answer to a reply without tool calls; None when the episode is done."""
        started = asyncio.get_running_loop().time()
        what = f"{type(self._environment).__name__}.respond"
        try:
            answer = await guarded(what, Cause.ENVIRONMENT, self.respond_seconds, self._environment.respond, message)
        finally:
            self.seconds += asyncio.get_running_loop().time() - started
        return None if answer is None else as_messages(answer)

    async def _run(self, call: ToolCall) -> object:
        arguments = self._validate(call)
        method = getattr(self._environment, self._specs[call.name].method)
        what = f"tool {type(self._environment).__name__}.{call.name}"
        for attempt in range(UNAVAILABLE_RETRIES + 1):
            try:
                return await guarded(what, Cause.ENVIRONMENT, self.tool_seconds, method, **arguments)
            except ToolUnavailable as error:
                if attempt == UNAVAILABLE_RETRIES:
                    raise Failure(Cause.TOOLS, f"{what}: unavailable {attempt + 1} times; last: {error}") from error
                self.retries += 1
                await asyncio.sleep(min(error.retry_after, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def _validate(self, call: ToolCall) -> dict[str, Any]:
        spec = self._specs.get(call.name)
        if spec is None or call.name not in self._environment.tool_names():
            names = ", ".join(self._environment.tool_names()) or "none"
            raise ToolError(f"there is no tool named {call.name!r}; the tools are: {names}")
        try:
            parsed = spec.arguments.model_validate_json(call.arguments or "{}")
        except ValidationError as error:
            raise ToolError(f"bad arguments for {call.name}: {_complaint(error)}") from None
        return {name: getattr(parsed, name) for name in spec.arguments.model_fields}


def as_messages(answer: str | Message | Sequence[Message]) -> list[Message]:
    """What setup or respond returned, as messages; a text is one user message."""
    if isinstance(answer, str):
        return [Message(role="user", content=answer)]
    return [answer] if isinstance(answer, Message) else list(answer)


async def guarded(
    what: str, cause: Cause, seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call `function` under a deadline; whatever goes wrong that has no cause yet becomes Failure(cause)."""
    try:
        async with asyncio.timeout(seconds):
            return await threads.call(function, *args, **kwargs)
    except (ToolError, ToolUnavailable, Failure):
        raise
    except TimeoutError as error:
        raise Failure(cause, f"{what} did not finish within {seconds:g} s") from error
    except (Exception, SystemExit) as error:
        raise Failure(cause, f"{what} raised {type(error).__name__}: {error}") from error
