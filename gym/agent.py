"""The agent seam: whatever drives a policy through an episode, and the recorder under it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.policy import Policy
from palaestra.gym.tools import Tools
from palaestra.gym.types import Completion, Limits, Message, Sampling, Task, Turn

MAIN = "main"


class Chat(Protocol):
    """What an agent holds of the policy."""

    async def reply(self, conversation: Sequence[Message], agent: str = MAIN) -> Message:
        """The policy's reply to a whole conversation, resent or extended, as the agent likes."""
        ...


class Agent(Protocol):
    """Any code that plays an episode by calling the policy and the tools."""

    async def run(self, task: Task, tools: Tools, chat: Chat) -> None:
        """Play. Returns when the agent has finished; lets Failure pass."""
        ...


class Loop:
    """The default agent: reply, run the tools it called, reply again; ask the environment when no tool was called."""

    async def run(self, task: Task, tools: Tools, chat: Chat) -> None:
        """Play until the environment has nothing more to say."""
        conversation = list(task.messages())
        while True:
            message = await chat.reply(conversation)
            conversation.append(message)
            if message.tool_calls:
                conversation += [await tools.call(call) for call in message.tool_calls]
                if tools.over:
                    return
                continue
            answer = await tools.respond(message)
            if answer is None:
                return
            conversation += answer


def _same(left: Message, right: Message) -> bool:
    """Whether two messages are the same to a client that resends them: reasoning and provider data may be dropped."""
    return left is right or (left.role, left.content, left.tool_calls, left.tool_call_id) == (
        right.role,
        right.content,
        right.tool_calls,
        right.tool_call_id,
    )


class Recorder:
    """Turns an agent's calls into a tree of turns.

    It compares the conversation it is shown with the paths it knows: the longest path whose messages are a prefix is
    the parent, the rest is new; where nothing fits, a new root begins. So a loop, a branching agent, a compaction and a
    client that resends its history are one mechanism.
    """

    def __init__(
        self, policies: Mapping[str, Policy], tools: Tools, sampling: Sampling, episode_id: str, limits: Limits
    ) -> None:
        self._policies = policies
        self._tools = tools
        self._sampling = sampling
        self._id = episode_id
        self._limits = limits
        self._messages: list[tuple[Message, ...]] = []
        self._session: list[str] = []
        self._tip: dict[str, int] = {}
        self._sessions = 0
        self._started = 0
        self.tokens = 0
        self.seconds = 0.0
        self.turns: list[Turn] = []

    async def reply(self, conversation: Sequence[Message], agent: str = MAIN) -> Message:
        """The policy's reply, recorded.

        Raises Failure(LIMIT_TURNS) or Failure(LIMIT_TOKENS) when the episode's budget is spent.
        """
        self._spend()
        policy = self._policy(agent)
        parent = self._parent(conversation, agent)
        known = 0 if parent is None else len(self._messages[parent])
        new = tuple(conversation[known:])
        session = self._take_session(parent)
        path = [] if parent is None else self._path(parent)
        started = asyncio.get_running_loop().time()
        completion = await policy.reply(path, new, self._tools.declarations, self._sampling, session)
        self.seconds += asyncio.get_running_loop().time() - started
        return self._record(Turn(agent, parent, new, completion), session)

    async def release(self) -> None:
        """Let the policies forget every session of this episode."""
        for policy in {id(policy): policy for policy in self._policies.values()}.values():
            for session in {f"{self._id}/{number}" for number in range(self._sessions)}:
                await policy.release(session)

    @property
    def cut(self) -> Cause | None:
        """The limit that cut the main agent's last reply, if one did."""
        last = next((turn.completion for turn in reversed(self.turns) if turn.agent == MAIN), None)
        reasons = {"length": Cause.LIMIT_TOKENS, "context": Cause.LIMIT_CONTEXT}
        return None if last is None else reasons.get(last.finish_reason)

    @property
    def answer(self) -> str:
        """The main agent's last reply, if it calls no tool; else empty."""
        replies = [turn.completion.message for turn in self.turns if turn.agent == MAIN]
        return next((message.content for message in reversed(replies) if not message.tool_calls), "")

    def _policy(self, agent: str) -> Policy:
        return self._policies.get(agent, self._policies[MAIN])

    def _spend(self) -> None:
        if self._limits.turns is not None and self._started >= self._limits.turns:
            raise Failure(Cause.LIMIT_TURNS, f"the episode's {self._limits.turns} turns are spent")
        if self._limits.tokens is not None and self.tokens >= self._limits.tokens:
            raise Failure(Cause.LIMIT_TOKENS, f"the episode's {self._limits.tokens} tokens are spent")
        self._started += 1

    def _parent(self, conversation: Sequence[Message], agent: str) -> int | None:
        """The turn with the longest path that the conversation begins with; the longest are tried first."""
        for index in sorted(range(len(self.turns)), key=lambda index: -len(self._messages[index])):
            messages = self._messages[index]
            same_policy = self._policy(self.turns[index].agent) is self._policy(agent)
            if same_policy and len(messages) <= len(conversation) and all(map(_same, messages, conversation)):
                return index
        return None

    def _take_session(self, parent: int | None) -> str:
        """The parent's session if the parent is its newest turn and nobody else continues it; else a new one."""
        if parent is not None and self._tip.get(self._session[parent]) == parent:
            del self._tip[self._session[parent]]
            return self._session[parent]
        self._sessions += 1
        return f"{self._id}/{self._sessions - 1}"

    def _path(self, leaf: int) -> list[Turn]:
        path = [self.turns[leaf]]
        while (parent := path[-1].parent) is not None:
            path.append(self.turns[parent])
        return path[::-1]

    def _record(self, turn: Turn, session: str) -> Message:
        before = () if turn.parent is None else self._messages[turn.parent]
        message = _with_call_ids(turn.completion.message, len(self.turns))
        completion = turn.completion
        if message is not completion.message:
            completion = Completion(
                message,
                completion.prompt_ids,
                completion.generation,
                completion.finish_reason,
                completion.timing,
                completion.usage,
            )
        self.turns.append(Turn(turn.agent, turn.parent, turn.added, completion))
        self._messages.append((*before, *turn.added, message))
        self._session.append(session)
        self._tip[session] = len(self.turns) - 1
        generation = completion.generation
        self.tokens += len(generation.ids) if generation is not None else completion.usage.get("completion_tokens", 0)
        return message


def _with_call_ids(message: Message, turn: int) -> Message:
    """The message with an id on every tool call: the endpoint's where it gave one, else call_{turn}_{index}."""
    if all(call.id for call in message.tool_calls):
        return message
    calls = tuple(
        call if call.id else call.model_copy(update={"id": f"call_{turn}_{index}"})
        for index, call in enumerate(message.tool_calls)
    )
    return message.model_copy(update={"tool_calls": calls})
