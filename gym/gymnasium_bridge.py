"""Gymnasium both ways: any of our environments as a `gymnasium.Env`, and any `gymnasium.Env` with discrete or text
actions as one of ours (`gymnasium:ID`)."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import random
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar

import gymnasium
from gymnasium import spaces
from gymnasium.error import Error as GymnasiumError
from pydantic import BaseModel, ConfigDict, Field

from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment, metric, reward
from palaestra.gym.episode import run_episode
from palaestra.gym.outcome import Failure
from palaestra.gym.policies import Null
from palaestra.gym.policy import Policy, ToolDeclaration
from palaestra.gym.registry import EnvironmentSpec, UsageError, one_line
from palaestra.gym.tasksets import split_of
from palaestra.gym.types import Completion, Episode, Limits, Message, Sampling, Scored, Task, ToolCall, Turn

LONGEST_TEXT = 1_000_000
STEP_SECONDS = 900.0
LONGEST_EPISODE = 1000
INVALID_ALLOWED = 10
"""Replies that are no action, beyond the steps of an episode."""


class AnyText(spaces.Text):
    """Text of any characters; samples are short and of letters and digits."""

    def __init__(self) -> None:
        super().__init__(max_length=64, min_length=0)

    def contains(self, x: Any) -> bool:
        """Whether x is a string."""
        return isinstance(x, str) and len(x) <= LONGEST_TEXT

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText)


class _Seat(Null):
    """A policy that hands what it is asked to another thread, and waits for the reply from there."""

    def __init__(self, events: queue.Queue[Any]) -> None:
        self._events = events

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        answer: Future[Message] = Future()
        self._events.put((list(new), list(tools), answer))
        return Completion(await asyncio.wrap_future(answer))


class GymnasiumEnv(gymnasium.Env[str, str]):
    """One of our environments behind Gymnasium's interface.

    Observations are the new messages as text. An action is a reply as text, or a tool call as JSON text
    {"tool": NAME, "arguments": {...}}. The result comes with the last step. An episode that cannot be scored raises
    Failure, since Gymnasium has no word for it. `roles`: policies that the environment asks for besides the main one.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(self, spec: EnvironmentSpec, split: str = "train", roles: dict[str, Policy] | None = None) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()
        self._spec = spec
        self._split = split
        self._roles = dict(roles or {})
        self._events: queue.Queue[Any] = queue.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._prototype: Environment | None = None
        self._playing: Future[Episode] | None = None
        self._answer: Future[Message] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of a task drawn by `seed`; `options={"key": ...}` names the task instead."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        key = (options or {}).get("key")
        task = self._spec.task(key, self._split) if key is not None else next(self._spec.tasks(self._split, drawn))
        self._abandon()
        environment = self._open().fresh()
        policies = {**self._roles, "main": _Seat(self._events)}
        episode = run_episode(environment, Loop(), policies, task, Sampling(), f"gymnasium-{task.key}")
        self._playing = self._submit(episode)
        self._playing.add_done_callback(self._events.put)
        text, _, done, _, info = self._next()
        if done:
            raise RuntimeError(f"task {task.key}: the episode ended before its first reply")
        return text, {"key": task.key, **info}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Reply, or call a tool. Raises Failure where the episode cannot be scored."""
        if self._answer is None:
            raise RuntimeError("step() needs an episode under way; call reset()")
        answer, self._answer = self._answer, None
        answer.set_result(as_message(action))
        return self._next()

    def close(self) -> None:
        """End the episode under way and give everything back."""
        self._abandon()
        if self._loop is not None:
            if self._prototype is not None:
                self._submit(type(self._prototype).shut(self._prototype.resources)).result(STEP_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop, self._prototype = None, None

    def _next(self) -> tuple[str, float, bool, bool, dict[str, Any]]:
        event = self._events.get(timeout=STEP_SECONDS)
        if isinstance(event, tuple):
            new, tools, self._answer = event
            return "\n".join(message.content for message in new), 0.0, False, False, {"tools": tools}
        episode: Episode = event.result()
        if not isinstance(episode.result, Scored):
            raise Failure(episode.outcome.cause, episode.outcome.detail)
        truncated = episode.outcome.cause.value.startswith("limit:")
        info = {"outcome": episode.outcome.cause.value, "metrics": dict(episode.metrics)}
        return "", float(episode.result.value), not truncated, truncated, info

    def _open(self) -> Environment:
        if self._prototype is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(self._loop,), name="palaestra-gymnasium", daemon=True).start()
            kind, settings = self._spec.environment(), self._spec.settings()
            self._prototype = kind(settings, self._submit(kind.open(settings)).result(STEP_SECONDS))
        return self._prototype

    def _submit(self, coroutine: Any) -> Future[Any]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _abandon(self) -> None:
        """Cancel the episode under way and wait until it has closed its environment."""
        if self._playing is not None and not self._playing.done():
            finished = self._submit(_ended(self._playing))
            finished.result(STEP_SECONDS)
        self._events, self._playing, self._answer = queue.Queue(), None, None


async def _ended(playing: Future[Any]) -> None:
    """Cancel an episode of this loop, and return when its task has."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    playing.cancel()
    await asyncio.wait(others, timeout=STEP_SECONDS)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def as_message(action: str) -> Message:
    """An action as the policy's message: a tool call where it is JSON with "tool", else a reply."""
    try:
        value = json.loads(action)
    except ValueError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("tool"), str):
        call = ToolCall(id="", name=value["tool"], arguments=json.dumps(value.get("arguments") or {}))
        return Message(role="assistant", tool_calls=(call,))
    return Message(role="assistant", content=action)


class GymnasiumConfig(BaseModel):
    """`kwargs` go to gymnasium.make; an episode ends after `steps` steps (0: the environment's own limit)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kwargs: dict[str, Any] = Field(default_factory=dict)
    steps: int = Field(default=0, ge=0)


class Gymnasium(Environment):
    """A Gymnasium environment as a conversation: observations are messages, a reply's last integer (or its text) is
    the action, the return is the reward."""

    Config = GymnasiumConfig
    id: ClassVar[str] = ""

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """One task for each seed, split by the hash of its key."""
        own = gymnasium.spec(cls.id).max_episode_steps or LONGEST_EPISODE
        limits = Limits(turns=(config.steps or own) + INVALID_ALLOWED)
        return partial(cls._seeds, limits)

    @classmethod
    def _seeds(cls, limits: Limits, split: str, seed: int) -> Iterator[Task]:
        draw = random.Random(f"{split} {seed}")
        for _ in itertools.count():
            number = draw.randrange(2**31)
            key = f"{cls.id}-{number}"
            if split_of(key) == split:
                yield Task(key=key, prompt=f"You play {cls.id}.", seed=number, split=split, limits=limits)

    def setup(self, task: Task) -> str:
        """The first observation, and how to act."""
        self._env = gymnasium.make(self.id, max_episode_steps=self.config.steps or None, **self.config.kwargs)
        self._total, self._invalid, self._over = 0.0, 0, False
        observation, _ = self._env.reset(seed=task.seed)
        return f"{_rules(self._env.action_space)}\nObservation: {_shown(observation)}"

    def respond(self, message: Message) -> str | None:
        """The next observation, or None at the end."""
        action = _action(self._env.action_space, message.content)
        if action is None:
            self._invalid += 1
            return f"That is no action. {_rules(self._env.action_space)}"
        observation, earned, terminated, truncated, _ = self._env.step(action)
        self._total += float(earned)
        self._over = terminated or truncated
        return None if self._over else f"Reward: {float(earned):g}\nObservation: {_shown(observation)}"

    @reward
    def total(self) -> float:
        """The sum of the rewards of all steps."""
        return self._total

    @metric
    def invalid_actions(self) -> int:
        """Replies that were no action."""
        return self._invalid

    def close(self) -> None:
        """Close the Gymnasium environment."""
        env = self.__dict__.pop("_env", None)
        if env is not None:
            env.close()


def _rules(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        return f"Reply with one integer from {first} to {first + int(space.n) - 1}."
    return "Reply with the text of your action."


def _shown(observation: Any) -> str:
    return observation if isinstance(observation, str) else str(getattr(observation, "tolist", lambda: observation)())


def _action(space: spaces.Space[Any], text: str) -> Any:
    """The action that a reply names; None where it names none."""
    if isinstance(space, spaces.Discrete):
        numbers = re.findall(r"-?\d+", text)
        action: Any = int(numbers[-1]) if numbers and len(numbers[-1]) < 19 else None
    else:
        action = text.strip()
    return action if action is not None and space.contains(action) else None


def environment_class(id: str) -> type[Environment]:
    """The environment of `gymnasium:ID`. Raises UsageError where there is none, or its actions are neither discrete nor
    text."""
    try:
        gymnasium.spec(id)
        made = gymnasium.make(id)
    except GymnasiumError as error:
        raise UsageError(f"gymnasium:{id}: {one_line(error)}") from None
    except Exception as error:
        raise UsageError(f"gymnasium:{id} cannot be made: {one_line(error)}") from error
    space = made.action_space
    made.close()
    if not isinstance(space, spaces.Discrete | spaces.Text):
        raise UsageError(f"gymnasium:{id}: actions are {type(space).__name__}; only Discrete and Text can be played")
    name = "Gymnasium_" + re.sub(r"\W", "_", id)
    return type(name, (Gymnasium,), {"id": id, "__doc__": f"{id} of Gymnasium.", "__module__": __name__})
