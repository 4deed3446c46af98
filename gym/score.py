"""`palaestra env score`: judge recorded replies, in parallel, without a model.

A row holds the fields of the task's `data`, optionally `key` and `prompt`, and `reply` (text) or `messages` (the OpenAI
form). Tool calls are replayed into a fresh environment; a recording that runs differently there is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment
from palaestra.gym.episode import run_episode
from palaestra.gym.files import write_whole
from palaestra.gym.outcome import RULES
from palaestra.gym.policies import Null, shut
from palaestra.gym.policy import Policy, Replay
from palaestra.gym.registry import EnvironmentSpec, UsageError, one_line
from palaestra.gym.tasksets import read_rows
from palaestra.gym.types import Episode, Limits, Message, Sampling, Task
from palaestra.gym.wire import Judged, judged, message_from_json

REFUSED = "refused"
_ROW_FIELDS = ("key", "prompt", "reply", "messages")


@dataclass(frozen=True)
class Recording:
    """A task, the policy's replies in order, and, where `messages` were given, what was recorded between them."""

    task: Task
    replies: tuple[Message, ...]
    between: tuple[tuple[Message, ...], ...] = ()


class Refused(Exception):
    """A row that cannot be replayed, and why."""


def recording(row: Mapping[str, Any]) -> Recording:
    """A row as a recording. Raises Refused naming what is wrong with it."""
    if ("reply" in row) == ("messages" in row):
        raise Refused("a row needs either reply (text) or messages (a list)")
    data = {name: value for name, value in row.items() if name not in _ROW_FIELDS}
    prompt = row.get("prompt") or ""
    try:
        task = Task(key=_key(row), prompt=_prompt(prompt), data=data)
        if "reply" in row:
            return Recording(_limited(task, 1), (message_from_json({"content": row["reply"]}),))
        return _of_messages(task, [message_from_json(message) for message in row["messages"]])
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"not a row to score: {one_line(error)}") from None


def _key(row: Mapping[str, Any]) -> str:
    if "key" in row:
        return str(row["key"])
    text = json.dumps({name: row[name] for name in sorted(row) if name not in ("reply", "messages")}, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prompt(prompt: Any) -> str | tuple[Message, ...]:
    return prompt if isinstance(prompt, str) else tuple(message_from_json(message) for message in prompt)


def _limited(task: Task, turns: int) -> Task:
    return task.model_copy(update={"limits": Limits(turns=turns)})


def _of_messages(task: Task, messages: Sequence[Message]) -> Recording:
    replies = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if not replies:
        raise Refused("messages hold no reply (role assistant)")
    if replies[-1] != len(messages) - 1 and any(message.role != "tool" for message in messages[replies[-1] + 1 :]):
        raise Refused("messages end with what no reply follows")
    if not task.messages()[0].content:
        task = task.model_copy(update={"prompt": tuple(messages[: replies[0]])})
    between = tuple(tuple(messages[a + 1 : b]) for a, b in pairwise(replies))
    return Recording(_limited(task, len(replies)), tuple(messages[at] for at in replies), between)


class Scorer:
    """Scores rows on one environment whose resources are open. `roles`: policies that it asks for besides the main."""

    def __init__(self, prototype: Environment, roles: Mapping[str, Policy] | None = None) -> None:
        self._prototype = prototype
        self._roles = {**{role: Null() for role in prototype.roles}, **(roles or {})}

    async def score(self, row: Mapping[str, Any]) -> Judged:
        """The judgement of one row; a row that cannot be replayed has the outcome `refused` and no reward."""
        try:
            recorded = recording(row)
            episode = await self._play(recorded)
            _compare(recorded, episode)
        except Refused as refused:
            return Judged(key=_key(row), reward=None, rewards={}, outcome=REFUSED, detail=str(refused))
        return judged(episode)

    async def _play(self, recorded: Recording) -> Episode:
        tries = 0
        while True:
            policies = {**self._roles, "main": Replay(recorded.replies)}
            name = f"score-{recorded.task.key}-{tries}"
            environment = self._prototype.fresh()
            episode = await run_episode(environment, Loop(), policies, recorded.task, Sampling(), name)
            tries += 1
            if tries > RULES[episode.outcome.cause].retries:
                return episode


def _compare(recorded: Recording, episode: Episode) -> None:
    """Raises Refused where the episode did not run as it was recorded."""
    if not RULES[episode.outcome.cause].graded:
        return
    if len(episode.turns) < len(recorded.replies):
        raise Refused(f"the episode ends after reply {len(episode.turns)} of {len(recorded.replies)}")
    for number, (before, turn) in enumerate(zip(recorded.between, episode.turns[1:], strict=False), 1):
        now = [message.content for message in turn.added]
        then = [message.content for message in before]
        if then and then != now:
            raise Refused(
                f"after reply {number} the recording says {str(then)[:100]}, replayed it says {str(now)[:100]}"
            )


async def score_rows(
    spec: EnvironmentSpec,
    rows: Sequence[Mapping[str, Any]],
    jobs: int = 8,
    on_row: Callable[[Judged], None] = lambda verdict: None,
    roles: Mapping[str, Policy] | None = None,
) -> list[Judged]:
    """Judge all rows, `jobs` at once; verdicts in the order of the rows."""
    kind, settings = spec.environment(), spec.settings()
    slots = asyncio.Semaphore(jobs)
    prototype = kind(settings, await kind.open(settings))
    scorer = Scorer(prototype, roles)

    async def one(row: Mapping[str, Any]) -> Judged:
        async with slots:
            verdict = await scorer.score(row)
        on_row(verdict)
        return verdict

    try:
        async with asyncio.TaskGroup() as group:
            judging = [group.create_task(one(row)) for row in rows]
        return [task.result() for task in judging]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from group_error
    finally:
        await kind.shut(prototype.resources)
        await shut(list((roles or {}).values()))


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet file. Raises UsageError naming file and line."""
    try:
        return list(read_rows(path))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def save(path: Path, verdicts: Sequence[Judged]) -> None:
    """Write a line for each verdict, the whole file or none of it."""
    write_whole(path, "".join(verdict.model_dump_json() + "\n" for verdict in verdicts).encode())
