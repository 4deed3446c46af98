"""The Policy protocol: messages in, a reply out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from palaestra.gym.types import Completion, Message, Sampling, Turn

ToolDeclaration = dict[str, Any]
"""A tool in the OpenAI form: {"type": "function", "function": {"name", "description", "parameters"}}."""


@runtime_checkable
class Policy(Protocol):
    """Whatever can reply to a conversation."""

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """Reply to the conversation `path` (turns from a root) followed by the messages `new`.

        Raises Failure(MODEL_SERVER) if the policy cannot be reached, Failure(LIMIT_CONTEXT) if the conversation is too
        long for it.
        """
        ...

    async def release(self, session: str) -> None:
        """Forget what is cached for `session`. Idempotent."""
        ...


class Replay:
    """A policy that replies with given messages in order, whatever it is asked; then with nothing."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = list(messages)

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """The message whose place is the number of turns so far."""
        at = len(path)
        return Completion(self._messages[at] if at < len(self._messages) else Message(role="assistant"))

    async def release(self, session: str) -> None:
        """Nothing is cached."""
