"""`palaestra env check`: whether an environment keeps its promises, and a line that names each fault."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Any

from palaestra.gym import worker
from palaestra.gym.agent import Loop
from palaestra.gym.environment import Environment, gold_of, judges
from palaestra.gym.episode import Bounds, run_episode
from palaestra.gym.fuzz import MALFORMED, broken_calls, valid_calls
from palaestra.gym.leftovers import Holdings, holdings, left_since, marked
from palaestra.gym.outcome import RULES, Cause, Failure
from palaestra.gym.policies import Null
from palaestra.gym.policy import Policy, Replay, ToolDeclaration
from palaestra.gym.registry import EnvironmentSpec, UsageError, one_line
from palaestra.gym.tools import ToolUnavailable, guarded, specs, undeclared
from palaestra.gym.types import Completion, Episode, Limits, Message, Record, Sampling, Scored, Task, Turn, Unscored
from palaestra.gym.wire import number, transcript

ROUNDS = 3
MOST_TURNS = 64
"""Turns of an episode under check, unless gold is longer."""
FUZZED_CALLS = 12
_CLOSE_ENOUGH = 1e-6


class Finding(Record):
    """What one check found. `message` is one line: the fault, or why the check could not be made (skipped)."""

    check: str
    ok: bool
    message: str = ""
    skipped: bool = False


class _Skip(Exception):
    """A check that cannot be made, and why."""


class _Subject:
    """The environment under check: a prototype with open resources, some tasks, and their gold."""

    def __init__(self, spec: EnvironmentSpec, tasks: Sequence[Task], seconds: float) -> None:
        self.spec = spec
        self.kind = spec.environment()
        self.tasks = list(tasks)
        self.prototype = self.kind(spec.settings())
        self.full = sum(max(judge.weight or 0.0, 0.0) for judge in judges(self.kind))
        self.seconds = seconds
        limits = Limits(seconds=10 * seconds)
        self.bounds = Bounds(
            limits=limits, setup=6 * seconds, tool=seconds, respond=seconds, judge=6 * seconds, close=seconds
        )
        self.golds: dict[str, list[Message]] = {}
        self.hindrance = ""
        self.stuck = False
        self.faulty: set[str] = set()
        self.turns = MOST_TURNS
        self.mark = ""

    def declarations(self) -> list[ToolDeclaration]:
        """All tools of the environment."""
        return [spec.declaration for spec in specs(self.kind).values()]

    def gold_tasks(self) -> list[Task]:
        """The tasks whose gold can be played. Raises _Skip where there is none."""
        if self.hindrance:
            raise _Skip(self.hindrance)
        return [task for task in self.tasks if task.key in self.golds]

    def scripts(self) -> list[tuple[Task, list[Message]]]:
        """Something to play on each of up to two tasks (gold, else nothing), and each tool that gold does not call."""
        golds = {} if self.hindrance else self.golds
        played = [(task, golds.get(task.key, [])) for task in self.tasks[:2]]
        tried = {call.name for _, script in played for message in script for call in message.tool_calls}
        others = [tool for tool in self.declarations() if tool["function"]["name"] not in tried | self.faulty]
        return played + [(self.tasks[0], list(valid_calls(tool, 1, seed=1))) for tool in others]

    async def play(self, task: Task, policy: Policy, environment: Environment | None = None) -> Episode:
        """One episode on a fresh object."""
        policies = {**{role: Null() for role in self.kind.roles}, "main": policy}
        environment = environment or self.prototype.fresh()
        name = f"check-{task.key}"
        limits = task.limits.model_copy(update={"turns": min(task.limits.turns or self.turns, self.turns)})
        task = task.model_copy(update={"limits": limits})
        episode = await run_episode(environment, Loop(), policies, task, Sampling(seed=0), name, self.bounds)
        self.stuck = self.stuck or "did not finish" in episode.provenance.get("close_error", "")
        return episode


class _Staged(Replay):
    """Plays messages; before the reply number `at` it does what `pause` says."""

    def __init__(self, messages: Sequence[Message], at: Sequence[int], pause: Callable[[], Awaitable[None]]) -> None:
        super().__init__(messages)
        self._at, self._pause = at, pause

    async def reply(self, path: Sequence[Turn], *rest: Any) -> Completion:
        if len(path) in self._at:
            await self._pause()
        return await super().reply(path, *rest)


async def check(
    spec: EnvironmentSpec,
    tasks: int = 4,
    seconds: float = 10.0,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Check an environment on some of its tasks. `seconds`: the deadline of a tool call; other phases get multiples.

    Raises UsageError where the environment or its tasks cannot be had.
    """
    listed = list(islice(spec.tasks("train", 0), tasks))
    subject = _Subject(spec, listed, seconds)
    findings: list[Finding] = []
    with marked() as subject.mark:
        before = holdings(subject.mark)
        try:
            await _with_resources(subject, findings, on_finding)
        finally:
            worker.shut()
        processes = Holdings(processes=holdings(subject.mark).beyond(before).processes).named(1)
        _record(findings, on_finding, "shut", [f"after shut() is left: {line}" for line in processes])
    return findings


async def _with_resources(subject: _Subject, findings: list[Finding], on_finding: Callable[[Finding], None]) -> None:
    kind = subject.kind
    try:
        subject.prototype.resources = await kind.open(subject.prototype.config)
    except Exception as error:
        raise UsageError(f"environment {subject.spec.alias}: open() raised {one_line(error)}") from error
    try:
        for name, one in CHECKS.items():
            try:
                if subject.stuck and one is not _close:
                    raise _Skip("close hangs")
                problems = await one(subject)
            except _Skip as skip:
                finding = Finding(check=name, ok=True, message=f"skipped: {skip}", skipped=True)
                findings.append(finding)
                on_finding(finding)
                continue
            _record(findings, on_finding, name, problems)
    finally:
        await kind.shut(subject.prototype.resources)


def _record(findings: list[Finding], on_finding: Callable[[Finding], None], name: str, problems: Sequence[str]) -> None:
    lines = [" ".join(line.split())[:400] for line in problems]
    found = [Finding(check=name, ok=False, message=line) for line in lines] or [Finding(check=name, ok=True)]
    findings.extend(found)
    for finding in found:
        on_finding(finding)


def _infrastructure(episode: Episode) -> bool:
    return not RULES[episode.outcome.cause].graded


def _ended(episode: Episode) -> str:
    return f"{episode.outcome.cause.value}: {episode.outcome.detail}"


def _is_full(subject: _Subject, episode: Episode) -> bool:
    """Whether all was earned that can be; never where nothing can."""
    earned = episode.result.value if isinstance(episode.result, Scored) else 0.0
    return subject.full > 0 and earned >= subject.full - _CLOSE_ENOUGH


def _earned(episode: Episode) -> str:
    value = number(episode.result)
    return f"nothing, unscored ({_ended(episode)})" if value is None else f"{value:g}"


def _unique(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


async def _tools(subject: _Subject) -> list[str]:
    return undeclared(subject.kind)


async def _gold(subject: _Subject) -> list[str]:
    if not subject.full:
        subject.hindrance = "the environment has no @reward of positive weight"
        return [f"{subject.kind.__name__} has no @reward of positive weight; mark the method that judges with @reward"]
    problems: list[str] = []
    for task in subject.tasks:
        try:
            gold = gold_of(subject.prototype.fresh(), task)
        except UsageError as error:
            subject.hindrance = "solution(task) is at fault"
            return [*problems, str(error)]
        if gold is None:
            continue
        subject.golds[task.key] = gold
        subject.turns = max(subject.turns, 2 * len(gold))
        episode = await subject.play(task, Replay(gold))
        if _infrastructure(episode):
            subject.hindrance = "gold does not play to its end"
            return [*problems, f"task {task.key}: gold ended {_ended(episode)}"]
        if not _is_full(subject, episode):
            problems.append(f"task {task.key}: gold earned {_earned(episode)}, not the full {subject.full:g}")
    if not subject.golds:
        subject.hindrance = "the environment has no solution(task)"
        raise _Skip(subject.hindrance)
    return problems


async def _null(subject: _Subject) -> list[str]:
    problems: list[str] = []
    for task in subject.tasks:
        episode = await subject.play(task, Null())
        if _infrastructure(episode):
            problems.append(f"task {task.key}: an empty reply ended {_ended(episode)}")
        elif _is_full(subject, episode):
            problems.append(f"task {task.key}: an empty reply earned the full {subject.full:g}")
    return problems


async def _differing(subject: _Subject) -> list[str]:
    """Gold of another task; two tasks may share an answer, so only more than half of the pairs is a fault."""
    tasks = subject.gold_tasks()
    pairs = [(task, other) for task in tasks for other in tasks if subject.golds[task.key] != subject.golds[other.key]]
    if not pairs:
        raise _Skip("all gold replies are alike")
    episodes = [await subject.play(task, Replay(subject.golds[other.key])) for task, other in pairs[:8]]
    right = sum(_is_full(subject, episode) for episode in episodes)
    if 2 * right <= len(episodes):
        return []
    return [f"the gold of another task earned the full {subject.full:g} in {right} of {len(episodes)} episodes"]


def _signature(episode: Episode) -> dict[str, Any]:
    rewards = {f"reward {name}": number(reward) for name, reward in episode.rewards.items()}
    messages = {f"message {at}": message for at, message in enumerate(transcript(episode))}
    return {"outcome": _ended(episode), **messages, **rewards}


def _difference(first: Episode, second: Episode) -> str:
    left, right = _signature(first), _signature(second)
    names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    names.sort(key=lambda name: not name.startswith("reward"))
    return "" if not names else f"{names[0]} was {left.get(names[0])!s:.80} and then {right.get(names[0])!s:.80}"


async def _repeat(subject: _Subject) -> list[str]:
    again = list(islice(subject.spec.tasks("train", 0), len(subject.tasks)))
    problems = [] if again == subject.tasks else ["the tasks of split train, seed 0 differ when asked for again"]
    for task, script in subject.scripts()[:2]:
        episodes = [await subject.play(task, Replay(script)) for _ in range(ROUNDS)]
        differences = [_difference(episodes[0], episode) for episode in episodes[1:]]
        problems += [f"task {task.key}: the same episode again differs: {text}" for text in differences if text][:1]
    return problems


async def _malformed(subject: _Subject) -> list[str]:
    task = subject.tasks[0]
    texts = [[Message(role="assistant", content=text)] for text in MALFORMED]
    problems: list[str] = []
    for script in [*texts, list(broken_calls(subject.declarations()))]:
        episode = await _play_unlimited(subject, task, script)
        if _infrastructure(episode):
            problems.append(f"malformed reply {script[0].content[:40]!r} ended {_ended(episode)}")
        elif not isinstance(episode.result, Scored):
            problems.append(f"malformed reply {script[0].content[:40]!r} earned {_earned(episode)}")
    return _unique(problems)[:5]


async def _fuzzed_tools(subject: _Subject) -> list[str]:
    if not subject.declarations():
        raise _Skip("the environment has no tools")
    problems: list[str] = []
    for tool in subject.declarations():
        episode = await _play_unlimited(subject, subject.tasks[0], list(valid_calls(tool, FUZZED_CALLS, seed=0)))
        if _infrastructure(episode):
            calls = [call for turn in episode.turns for call in turn.completion.message.tool_calls]
            subject.faulty.add(tool["function"]["name"])
            given = calls[-1].arguments[:60] if calls else "{}"
            problems.append(f"tool {tool['function']['name']} on {given} ended {_ended(episode)}")
    return problems


async def _play_unlimited(subject: _Subject, task: Task, script: Sequence[Message]) -> Episode:
    return await subject.play(task.model_copy(update={"limits": Limits()}), Replay(script))


async def _isolation(subject: _Subject) -> list[str]:
    """Episodes that wait for each other before their first and their last reply end as they do alone."""
    tasks = subject.gold_tasks() * 2
    alone = {task.key: await subject.play(task, Replay(subject.golds[task.key])) for task in subject.gold_tasks()}
    barriers = [asyncio.Barrier(len(tasks)), asyncio.Barrier(len(tasks))]

    def staged(task: Task) -> Policy:
        gold, waits = subject.golds[task.key], iter(barriers)

        async def meet() -> None:
            with contextlib.suppress(TimeoutError, asyncio.BrokenBarrierError):
                async with asyncio.timeout(subject.seconds):
                    await next(waits).wait()

        return _Staged(gold, sorted({0, len(gold) - 1}), meet)

    together = await asyncio.gather(*(subject.play(task, staged(task)) for task in tasks))
    return _unique(
        [
            f"task {task.key}: state is shared between episodes: alone and then beside others, {difference}"
            for task, episode in zip(tasks, together, strict=True)
            if (difference := _difference(alone[task.key], episode))
        ]
    )[:3]


async def _close(subject: _Subject) -> list[str]:
    name = subject.kind.__name__
    task, script = subject.scripts()[0]
    environment = subject.prototype.fresh()
    episode = await subject.play(task, Replay(script), environment)
    problems = [episode.provenance["close_error"]] if "close_error" in episode.provenance else []
    bare = subject.prototype.fresh()
    bare.task = task
    for what, closed in (("a second", environment), ("a third", environment), ("one before setup", bare)):
        try:
            await guarded(f"{name}.close", Cause.ENVIRONMENT, subject.seconds, closed.close)
        except Failure as failure:
            problems.append(f"close is not idempotent: {what} call: {failure.detail}")
    return problems[:2]


async def _leftovers(subject: _Subject) -> list[str]:
    async def once(task: Task, script: Sequence[Message]) -> None:
        await subject.play(task, Replay(script))

    return await _left(subject, once, "a finished episode leaves behind")


async def _cancelled(subject: _Subject) -> list[str]:
    async def once(task: Task, script: Sequence[Message]) -> None:
        reached = asyncio.Event()

        async def stall() -> None:
            reached.set()
            await asyncio.sleep(20 * subject.seconds)

        policy = _Staged(script, [sum(bool(message.tool_calls) for message in script)], stall)
        playing = asyncio.ensure_future(subject.play(task, policy))
        waiting = asyncio.ensure_future(reached.wait())
        await asyncio.wait([playing, waiting], timeout=8 * subject.seconds, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        playing.cancel()
        await asyncio.wait([playing], timeout=8 * subject.seconds)

    return await _left(subject, once, "a cancelled episode leaves behind")


async def _left(subject: _Subject, once: Callable[[Task, Sequence[Message]], Awaitable[None]], what: str) -> list[str]:
    """What is held after some rounds and was not after the first, which may fill caches."""
    for task, script in subject.scripts():
        began = holdings(subject.mark)
        await once(task, script)
        worker.shut()
        before = holdings(subject.mark)
        for _ in range(ROUNDS):
            await once(task, script)
        worker.shut()
        started = Holdings(began.processes, before.threads, before.descriptors)
        lines = await left_since(started, subject.mark, ROUNDS)
        if lines:
            return [f"{what}: {line}" for line in lines]
    return []


async def _faults(subject: _Subject) -> list[str]:
    """Faults that are put in must come out under their own cause."""
    task, script = subject.scripts()[0]
    called = sorted({call.name for message in script for call in message.tool_calls})
    rewards = [judge.name for judge in judges(subject.kind) if judge.weight is not None]
    cases: list[tuple[str, Cause, Environment, Policy]] = [
        ("a model server that is down", Cause.MODEL_SERVER, subject.prototype.fresh(), _Down()),
        ("a setup that raises", Cause.ENVIRONMENT, _broken(subject, setup=_raise_error), Replay(script)),
    ]
    if rewards:
        dead = _dead_verifier(subject, rewards[0])
        cases.append(("a verifier whose canary fails", Cause.VERIFIER, dead, Replay(script)))
    for name in called:
        down = _broken(subject, **{name: _raise_unavailable})
        cases.append((f"tool {name} unavailable", Cause.TOOLS, down, Replay(script)))
    problems: list[str] = []
    for what, cause, environment, policy in cases:
        episode = await subject.play(task, policy, environment)
        if episode.outcome.cause is not cause or not isinstance(episode.result, Unscored):
            problems.append(f"{what} came out as {_ended(episode)}, earning {_earned(episode)}; expected {cause.value}")
    return problems


class _Down(Null):
    async def reply(self, *_: Any) -> Completion:
        raise Failure(Cause.MODEL_SERVER, "injected: the server is down")


def _broken(subject: _Subject, **methods: Callable[..., Any]) -> Environment:
    environment = subject.prototype.fresh()
    for name, method in methods.items():
        setattr(environment, name, method)
    return environment


def _dead_verifier(subject: _Subject, judge: str) -> Environment:
    environment = _broken(subject, **{judge: _raise_verifier})
    return _broken_fresh(environment, _broken(subject, alive=lambda: False))


def _broken_fresh(environment: Environment, canary: Environment) -> Environment:
    environment.fresh = lambda: canary  # type: ignore[method-assign]
    return environment


def _raise_error(*_: Any, **__: Any) -> None:
    raise RuntimeError("injected")


def _raise_unavailable(*_: Any, **__: Any) -> None:
    raise ToolUnavailable("injected", retry_after=0.0)


def _raise_verifier(*_: Any, **__: Any) -> None:
    raise Failure(Cause.VERIFIER, "injected: the worker died")


CHECKS: dict[str, Callable[[_Subject], Awaitable[list[str]]]] = {
    "tools": _tools,
    "gold": _gold,
    "null": _null,
    "differing gold": _differing,
    "repeat": _repeat,
    "malformed replies": _malformed,
    "fuzzed tools": _fuzzed_tools,
    "isolation": _isolation,
    "close": _close,
    "leftovers": _leftovers,
    "cancelled": _cancelled,
    "faults": _faults,
}
"""The checks in their order; the later ones use what the first found out."""
