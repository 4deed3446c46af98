"""The nouns: the only records that cross folders.

Token data are numpy arrays in frozen dataclasses; what people read as JSON is a frozen pydantic model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from palaestra.gym.outcome import Cause

SCHEMA_VERSION = 1

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "context", "cancelled"]


class Record(BaseModel):
    """A frozen record that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(Record):
    """A request by the policy to run one tool; `arguments` is the JSON text as the policy wrote it."""

    id: str
    name: str
    arguments: str


class Message(Record):
    """One message of a conversation, in the OpenAI chat form.

    `provider_data` is opaque (signed reasoning, say) and is handed back to its provider untouched.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    provider_data: dict[str, Any] | None = None

    @classmethod
    def calling(cls, name: str, **arguments: Any) -> Message:
        """An assistant's message that calls one tool."""
        return cls(role="assistant", tool_calls=(ToolCall(id="", name=name, arguments=json.dumps(arguments)),))


class Limits(Record):
    """What one episode may use. `None` means the run's default."""

    turns: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)


class Source(Record):
    """Where a task came from. `trainable` is false for benchmarks that are for evaluation only."""

    dataset: str = ""
    licence: str = ""
    sha256: str = ""
    trainable: bool = True
    note: str = ""


class Task(Record):
    """One task: a stable key, a prompt, and the data its verifier needs.

    `prompt` is a list of messages, or the text of a single user message. `environment` is filled in by the registry.
    """

    key: str
    prompt: str | tuple[Message, ...]
    data: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    split: str = "train"
    difficulty: int = 0
    limits: Limits = Limits()
    source: Source = Source()
    environment: str = ""

    def messages(self) -> tuple[Message, ...]:
        """The prompt as messages."""
        return (Message(role="user", content=self.prompt),) if isinstance(self.prompt, str) else self.prompt


class Sampling(Record):
    """How a reply is drawn. Training accepts `temperature` alone; what prunes the distribution is for evaluation."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: all")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: dict[str, Any] | None = None
    max_tokens: int = Field(default=1024, ge=1)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    thinking: Literal["on", "off", "low"] = "off"
    thinking_budget: int | None = Field(default=None, ge=0)
    seed: int | None = None

    def pruning(self) -> list[str]:
        """The names of the settings that make the sampled distribution differ from softmax(logits / temperature)."""
        neutral = Sampling()
        names = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "json_schema")
        return [name for name in names if getattr(self, name) != getattr(neutral, name)]


@dataclass(frozen=True, eq=False)
class Routing:
    """Router choices uint16[positions, E layers, k], by reference: a file and the episode's rows in it."""

    path: str
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Generation:
    """What an engine drew.

    ids: int32[n]; logprobs: float32[n], natural log, of the distribution really sampled; sampled: bool[n], false for a
    token that no draw chose (its logprob is 0 and it carries no loss); versions: (policy version, number of tokens)
    spans that sum to n; timing in seconds by phase.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampled: NDArray[np.bool_]
    versions: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    routing: Routing | None = None
    timing: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not (len(self.logprobs) == len(self.sampled) == n == sum(count for _, count in self.versions)):
            raise ValueError(
                f"Generation: {n} ids need as many logprobs ({len(self.logprobs)}), sampled flags "
                f"({len(self.sampled)}) and versioned tokens ({sum(count for _, count in self.versions)})"
            )


@dataclass(frozen=True, eq=False)
class Completion:
    """What a policy replied. Where tokens are known, `prompt_ids` int32[m] are the ids added since the parent turn's
    last id (at a root: all of them); a chat policy leaves `prompt_ids` and `generation` None."""

    message: Message
    prompt_ids: NDArray[np.int32] | None = None
    generation: Generation | None = None
    finish_reason: FinishReason = "stop"
    timing: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Turn:
    """One call of a policy: who called, the turn it continues (an index into the episode's turns, None at a root), the
    messages added since that turn's reply, and the reply."""

    agent: str
    parent: int | None
    added: tuple[Message, ...]
    completion: Completion


class Scored(Record):
    """A reward, for the whole episode or for one turn."""

    kind: Literal["scored"] = "scored"
    value: float
    turn: int | None = None


class Unscored(Record):
    """No reward, and why. Never a number that stands for a failure."""

    kind: Literal["unscored"] = "unscored"
    cause: Cause
    detail: str = ""


Reward = Scored | Unscored


class Outcome(Record):
    """How an episode ended; `detail` says what happened and where."""

    cause: Cause = Cause.OK
    detail: str = ""


@dataclass(frozen=True, eq=False)
class Episode:
    """One attempt at a task, judged. `result` is the weighted sum of rewards; one Unscored among the weighted ones
    makes it Unscored."""

    id: str
    task: Task
    turns: tuple[Turn, ...] = ()
    answer: str = ""
    rewards: Mapping[str, Reward | tuple[Scored, ...]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    result: Reward = Unscored(cause=Cause.CANCELLED, detail="not judged yet")  # noqa: RUF009 (frozen)
    outcome: Outcome = Outcome()  # noqa: RUF009 (frozen)
    timings: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def path(self, leaf: int) -> list[Turn]:
        """The turns from the root to `leaf`, in order."""
        path: list[Turn] = []
        at: int | None = leaf
        while at is not None:
            path.append(self.turns[at])
            at = self.turns[at].parent
        return path[::-1]

    def leaves(self) -> list[int]:
        """Indices of the turns that no other turn continues: one training sequence each."""
        parents = {turn.parent for turn in self.turns}
        return [index for index in range(len(self.turns)) if index not in parents]


@dataclass(frozen=True, eq=False)
class Group:
    """The episodes of one task that were admitted at one training step: what an advantage is computed over."""

    task: Task
    step: int
    episodes: Sequence[Episode]
