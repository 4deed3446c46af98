"""The environment: tasks, tools and judgement. One object plays one episode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

from pydantic import BaseModel, ConfigDict

from palaestra.gym.outcome import Failure
from palaestra.gym.policy import Policy
from palaestra.gym.registry import UsageError, one_line, place
from palaestra.gym.tasksets import TaskSet, of_split
from palaestra.gym.tools import ToolError, ToolUnavailable, specs, tool
from palaestra.gym.types import Message, Task

__all__ = ["Environment", "NoConfig", "ToolError", "ToolUnavailable", "metric", "reward", "tool"]

F = TypeVar("F", bound=Callable[..., Any])
Tasks = TaskSet | Callable[[str, int], Iterable[Task]]
Answer = str | Message | Sequence[str | Message] | None
Progress = Callable[[str, int, int], None]
"""Told how far something is: of what, done, to do."""


class NoConfig(BaseModel):
    """The configuration of an environment that declares none: every key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Judge(NamedTuple):
    """A reward or metric method: its name, weight (None: a metric) and the names of what it asks for."""

    name: str
    weight: float | None
    wants: tuple[str, ...]


@overload
def reward(function: F) -> F: ...
@overload
def reward(*, weight: float = 1.0) -> Callable[[F], F]: ...
def reward(function: F | None = None, *, weight: float = 1.0) -> F | Callable[[F], F]:
    """Make a method a reward: it returns a number, None (unscored), a Scored or Unscored, or Scored ones by turn.

    The weighted sum of the rewards is the episode's result. A method gets, by name, only what it asks for: task,
    episode, answer, resources, config, or the name of a further policy's role.
    """

    def mark(function: F) -> F:
        function.__palaestra_weight__ = float(weight)  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def metric(function: F) -> F:
    """Make a method a metric: a number that is recorded and not trained on."""
    function.__palaestra_weight__ = None  # type: ignore[attr-defined]
    return function


_judges: dict[type, tuple[Judge, ...]] = {}


class Environment:
    """Base of all environments. Override what you need; every method may be sync or async.

    A subclass says where tasks come from (`tasks`), what the policy may do (`@tool`, `respond`) and how an episode is
    judged (`@reward`, `@metric`).
    """

    tasks: ClassVar[Any] = ()
    Config: ClassVar[type[BaseModel]] = NoConfig
    roles: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: BaseModel | None = None, resources: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.resources = resources
        self.policies: Mapping[str, Policy] = {}
        self.task: Task = Task(key="", prompt="")
        self.provenance: Mapping[str, Any] = {}

    @classmethod
    def task_set(cls, config: Any) -> Tasks:
        """The tasks under `config`: a TaskSet, or a callable (split, seed) -> tasks."""
        return cls.tasks  # type: ignore[no-any-return]

    @classmethod
    def iter_tasks(cls, config: Any, split: str, seed: int) -> Iterator[Task]:
        """The tasks of a split in the order that `seed` gives."""
        return of_split(cls.task_set(config), split, seed)

    @classmethod
    async def build(cls, count: int, seed: int, folder: Path | None, say: Progress) -> str:
        """Make `count` tasks from outside material in `folder` (None: the environment's own place), going on where an
        earlier build stopped. Returns what there is to say about it. `palaestra tasks build` calls this."""
        raise UsageError(f"{cls.__name__} makes no tasks from outside material")

    @classmethod
    def export(cls, task: Task, folder: Path) -> Path:
        """Write a task below `folder` in a form that other tools read; returns where. `palaestra tasks export` calls
        this."""
        raise UsageError(f"{cls.__name__} writes no tasks for other tools")

    @classmethod
    async def lacks(cls, config: Any) -> str:
        """Why this machine cannot play such episodes, in the words of `open`; empty where it can. A recipe leaves out
        an environment that is `optional` and lacks something."""
        try:
            await cls.shut(await cls.open(config))
        except (UsageError, Failure) as reason:
            return str(reason)
        return ""

    @classmethod
    async def open(cls, config: Any) -> Any:
        """Open what is costly and shared by many episodes (an index, a pool). Called once per actor."""
        return None

    @classmethod
    async def shut(cls, resources: Any) -> None:
        """Close what `open` returned."""

    def tool_names(self) -> Sequence[str]:
        """The tools on offer in this episode."""
        return tuple(specs(type(self)))

    def deadlines(self, task: Task) -> Mapping[str, float]:
        """Seconds that phases of an episode of `task` need at the least, by name: setup, tool (each call), respond,
        judge (each reward), close. An episode's Bounds give no less."""
        return {}

    def setup(self, task: Task) -> Any:
        """Prepare for `task`. Messages that it returns follow the task's prompt."""

    def respond(self, message: Message) -> Any:
        """Answer a reply without tool calls: a text or messages, or None when the episode is done."""
        return None

    def close(self) -> Any:
        """Give everything back. Idempotent."""

    def alive(self) -> Any:
        """Whether what the episodes share still works: the canary asks it before a failure is called the policy's."""
        return True

    def solution(self, task: Task) -> Answer:
        """The gold reply, or the policy's successive replies, tool calls included. None where it is not known."""
        return None

    def fresh(self) -> Environment:
        """Another object of the same environment, for another episode."""
        other = type(self)(self.config, self.resources)
        other.policies, other.provenance = self.policies, self.provenance
        return other


def judges(environment: type[Environment]) -> tuple[Judge, ...]:
    """The rewards and metrics of an environment class, in the order of their definition, base classes first."""
    if environment in _judges:
        return _judges[environment]
    found: dict[str, Judge] = {}
    for base in reversed(environment.__mro__):
        for name, member in vars(base).items():
            if hasattr(member, "__palaestra_weight__"):
                wants = tuple(inspect.signature(member).parameters)[1:]
                found[name] = Judge(name, member.__palaestra_weight__, wants)
    return _judges.setdefault(environment, tuple(found.values()))


def gold_messages(solution: Answer, whose: str = "the environment") -> list[Message] | None:
    """A solution as the assistant's messages in order; None where there is none. Raises UsageError for anything else,
    naming `whose` it is."""
    if solution is None:
        return None
    several = isinstance(solution, Iterable) and not isinstance(solution, str | Message)
    parts: list[Any] = list(solution) if several else [solution]
    messages = [Message(role="assistant", content=part) if isinstance(part, str) else part for part in parts]
    if all(isinstance(message, Message) for message in messages):
        return messages
    given = f"{solution!r:.80} ({type(solution).__name__})"
    raise UsageError(f"{whose}: solution(task) returned {given}; return a str, a Message, or a list of them")


def gold_of(environment: Environment, task: Task) -> list[Message] | None:
    """The gold of `task` as messages; None where the environment has none. Raises UsageError naming its fault."""
    name = type(environment).__name__
    try:
        solution = environment.solution(task)
    except Exception as error:
        where = place(error, type(environment).__module__)
        raise UsageError(f"{name}: solution(task) raised {one_line(error)}{where} for task {task.key}") from error
    return gold_messages(solution, name)
