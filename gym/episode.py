"""One episode from set-up to judgement: `run_episode`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import Field

from palaestra.gym.agent import MAIN, Agent, Loop, Recorder
from palaestra.gym.environment import Environment, Judge, gold_of, judges
from palaestra.gym.outcome import RULES, Cause, Failure
from palaestra.gym.policy import Policy, Replay
from palaestra.gym.registry import UsageError
from palaestra.gym.sandbox import Destroyed
from palaestra.gym.tools import Tools, as_messages, guarded
from palaestra.gym.types import Episode, Limits, Outcome, Record, Reward, Sampling, Scored, Task, Unscored

PHASES = ("setup", "tool", "respond", "judge", "close")

Rewards = dict[str, Reward | tuple[Scored, ...]]


class Bounds(Record):
    """What an episode may use, and how long each of its phases may take (seconds).

    A task's own limits go before `limits`, and what the environment says that its phases need (`Environment.deadlines`)
    before shorter ones here. `strict`: a missed deadline aborts the run instead of ending the episode (deterministic
    runs).
    """

    limits: Limits = Limits(turns=32, seconds=900)
    setup: float = Field(default=120, gt=0)
    tool: float = Field(default=60, gt=0)
    respond: float = Field(default=60, gt=0)
    judge: float = Field(default=120, gt=0)
    close: float = Field(default=30, gt=0)
    strict: bool = False

    def of(self, task: Task) -> Limits:
        """The limits of one task."""
        own = {name: value for name, value in task.limits.model_dump().items() if value is not None}
        return self.limits.model_copy(update=own)

    def longest(self, task: Task, judges: int) -> float:
        """Seconds after which an episode of a task is over whatever happens: each of its judges may be asked twice, and
        the canary does all of it once more. Infinite without a limit on its time."""
        seconds = self.of(task).seconds
        once = self.setup + (math.inf if seconds is None else seconds) + 2 * judges * self.judge + self.close
        return 2 * once + self.setup + self.judge

    def at_least(self, seconds: Mapping[str, float]) -> Bounds:
        """The same, where a phase of the table may not be cut shorter. Raises ValueError for what is no phase."""
        strange = sorted(seconds.keys() - set(PHASES))
        if strange:
            raise ValueError(f"there is no phase {strange[0]!r}; the phases are: {', '.join(PHASES)}")
        return self.model_copy(update={name: max(getattr(self, name), given) for name, given in seconds.items()})


class MissedDeadline(Exception):
    """A deadline passed in a strict (deterministic) run: the run stops, since going on would change its numbers."""


async def run_episode(
    environment: Environment,
    agent: Agent,
    policies: Mapping[str, Policy],
    task: Task,
    sampling: Sampling,
    id: str,
    bounds: Bounds | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Episode:
    """Set up, let the agent play, judge, close. Never raises for what goes wrong inside the episode: see its outcome.

    `policies` maps "main" and the names of further roles to policies. Raises KeyError where a role that the environment
    asks for is missing, and MissedDeadline in strict runs.
    """
    missing = [role for role in (MAIN, *environment.roles) if role not in policies]
    if missing:
        name = type(environment).__name__
        raise KeyError(f"{name} needs a policy for: {', '.join(missing)} (--role {missing[0]}=...)")
    run = _Run(environment, policies, task, sampling, id, bounds or Bounds())
    try:
        await run.play(agent)
        await run.judge()
    finally:
        await run.close()
    return run.episode({**environment.provenance, **(provenance or {})})


class _Run:
    """The state of one episode under way."""

    def __init__(
        self,
        environment: Environment,
        policies: Mapping[str, Policy],
        task: Task,
        sampling: Sampling,
        id: str,
        bounds: Bounds,
    ) -> None:
        self._environment = environment
        self._name = type(environment).__name__
        self._id = id
        self._bounds = bounds
        self._task = task
        self._limits = bounds.of(task)
        environment.task = task
        environment.policies = {role: policy for role, policy in policies.items() if role != MAIN}
        self._tools = Tools(environment, bounds.tool, bounds.respond)
        self._recorder = Recorder(policies, self._tools, sampling, id, self._limits)
        self._outcome = Outcome()
        self._timings: dict[str, float] = {}
        self._rewards: Rewards = {}
        self._metrics: dict[str, float] = {}
        self._close_error = ""
        self._start = time.monotonic()

    async def play(self, agent: Agent) -> None:
        """Set up and let the agent run."""
        try:
            async with self._phase("setup"):
                self._allow(self._environment.deadlines(self._task))
                task = await self._set_up()
            async with self._phase("play"), asyncio.timeout(self._limits.seconds) as clock:
                await agent.run(task, self._tools, self._recorder)
            cut = self._recorder.cut
            self._outcome = Outcome(cause=cut or Cause.OK, detail="the last reply was cut" if cut else "")
        except TimeoutError as error:
            if not clock.expired():
                self._outcome = _of(error)
                return
            detail = f"episode {self._id} took longer than {self._limits.seconds:g} s"
            if self._bounds.strict:
                raise MissedDeadline(detail) from error
            self._outcome = Outcome(cause=Cause.LIMIT_TIME, detail=detail)
        except Failure as failure:
            self._refuse_missed_deadline(failure)
            self._outcome = Outcome(cause=failure.cause, detail=failure.detail)
        except Exception as error:
            self._outcome = _of(error)

    async def judge(self) -> None:
        """Run the rewards and metrics; an episode that is not graded keeps Unscored everywhere."""
        declared = judges(type(self._environment))
        unscored = Unscored(cause=self._outcome.cause, detail=self._outcome.detail)
        self._rewards = {judge.name: unscored for judge in declared if judge.weight is not None}
        if not RULES[self._outcome.cause].graded:
            return
        async with self._phase("judge"):
            for judge in declared:
                await self._judge_one(judge)

    async def close(self) -> None:
        """Close the environment and release the policies' sessions, whatever happened."""
        async with self._phase("close"):
            try:
                what = f"{self._name}.close"
                await guarded(what, Cause.ENVIRONMENT, self._bounds.close, self._environment.close)
            except Failure as failure:
                self._close_error = failure.detail
            async with asyncio.timeout(self._bounds.close):
                await self._recorder.release()

    def episode(self, provenance: Mapping[str, Any]) -> Episode:
        """The finished record."""
        recorder, tools = self._recorder, self._tools
        counts = {"turns": len(recorder.turns), "tool_calls": tools.calls, "tool_errors": tools.errors}
        timings = {**self._timings, "policy": recorder.seconds, "tools": tools.seconds}
        problems = {"close_error": self._close_error} if self._close_error else {}
        return Episode(
            id=self._id,
            task=self._task,
            turns=tuple(recorder.turns),
            answer=recorder.answer,
            rewards=self._rewards,
            metrics={**counts, "tool_retries": tools.retries, **self._metrics},
            result=self._result(),
            outcome=self._outcome,
            timings={**timings, "total": time.monotonic() - self._start},
            provenance={**provenance, **problems},
        )

    def _allow(self, seconds: Mapping[str, float]) -> None:
        self._bounds = self._bounds.at_least(seconds)
        self._tools.tool_seconds, self._tools.respond_seconds = self._bounds.tool, self._bounds.respond

    async def _set_up(self) -> Task:
        what = f"{self._name}.setup"
        try:
            added = await guarded(what, Cause.ENVIRONMENT, self._bounds.setup, self._environment.setup, self._task)
        except Destroyed as error:  # by the task itself: the policy has not yet been asked
            raise Failure(Cause.ENVIRONMENT, f"{what}: {error.detail}") from error
        if added is None:
            return self._task
        return self._task.model_copy(update={"prompt": (*self._task.messages(), *as_messages(added))})

    async def _judge_one(self, judge: Judge) -> None:
        if self._outcome.cause is Cause.POLICY_CRASH:
            if judge.weight is not None:
                self._rewards[judge.name] = Scored(value=0.0)
            return
        try:
            value = await self._ask(judge)
        except Failure as failure:
            self._refuse_missed_deadline(failure)
            await self._blame(judge, failure)
            return
        if judge.weight is not None:
            self._rewards[judge.name] = self._as_reward(judge.name, value)
        elif value is not None:
            number = _number(value)
            if number is None:
                self._outcome = self._strange(judge.name, value)
            else:
                self._metrics[judge.name] = number

    async def _ask(self, judge: Judge) -> Any:
        """Ask a judge; a verifier that died is asked once more."""
        offered = self._offered()
        strange = [name for name in judge.wants if name not in offered]
        if strange:
            raise Failure(
                Cause.ENVIRONMENT,
                f"{self._name}.{judge.name} asks for {', '.join(strange)}; it may ask for {', '.join(offered)}",
            )
        method = getattr(self._environment, judge.name)
        what = f"{self._name}.{judge.name}"
        wanted = {name: offered[name] for name in judge.wants}
        try:
            return await guarded(what, Cause.ENVIRONMENT, self._bounds.judge, method, **wanted)
        except Failure as failure:
            if failure.cause is not Cause.VERIFIER:
                raise
            return await guarded(what, Cause.ENVIRONMENT, self._bounds.judge, method, **wanted)

    async def _blame(self, judge: Judge, failure: Failure) -> None:
        """The canary rule: a reply that twice killed a verifier which judges the canary well is scored 0. Of a lost box
        the sandbox itself knows whose doing it was (gym/sandbox.py, Destroyed)."""
        cause = failure.cause
        if cause is Cause.VERIFIER and await canary(self._environment, self._bounds):
            cause = Cause.POLICY_CRASH
        self._outcome = Outcome(cause=cause, detail=failure.detail)
        if cause is Cause.POLICY_CRASH:
            self._rewards = {name: Scored(value=0.0) for name in self._rewards}
        elif judge.weight is not None:
            self._rewards[judge.name] = Unscored(cause=cause, detail=failure.detail)

    def _offered(self) -> dict[str, Any]:
        environment = self._environment
        return {
            **environment.policies,
            "task": self._task,
            "episode": Episode(
                id=self._id,
                task=self._task,
                turns=tuple(self._recorder.turns),
                answer=self._recorder.answer,
                outcome=self._outcome,
            ),
            "answer": self._recorder.answer,
            "resources": environment.resources,
            "config": environment.config,
        }

    def _as_reward(self, name: str, value: Any) -> Reward | tuple[Scored, ...]:
        if value is None:
            return Unscored(cause=Cause.VERIFIER, detail=f"{self._name}.{name} returned None")
        if isinstance(value, Scored | Unscored):
            return value
        if isinstance(value, Sequence) and value and all(isinstance(part, Scored) for part in value):
            return tuple(value)
        number = _number(value)
        if number is None or not math.isfinite(number):
            self._outcome = self._strange(name, value)
            return Unscored(cause=Cause.ENVIRONMENT, detail=self._outcome.detail)
        return Scored(value=number)

    def _strange(self, name: str, value: Any) -> Outcome:
        given = f"{value!r:.80} ({type(value).__name__})"
        wanted = "return a finite number (or Scored, Unscored, a sequence of Scored)"
        return Outcome(cause=Cause.ENVIRONMENT, detail=f"{self._name}.{name} returned {given}; {wanted}")

    def _result(self) -> Reward:
        """The weighted sum; none where anything was lost, be it a metric: such an episode is played again."""
        if not RULES[self._outcome.cause].graded:
            return Unscored(cause=self._outcome.cause, detail=self._outcome.detail)
        total = 0.0
        for judge in judges(type(self._environment)):
            if not judge.weight:
                continue
            value = self._rewards.get(judge.name, Unscored(cause=self._outcome.cause, detail="not judged"))
            if isinstance(value, Unscored):
                return value
            parts = value if isinstance(value, tuple) else (value,)
            total += judge.weight * sum(part.value for part in parts)
        return Scored(value=total)

    def _refuse_missed_deadline(self, failure: Failure) -> None:
        if self._bounds.strict and isinstance(failure.__cause__, TimeoutError):
            raise MissedDeadline(f"episode {self._id}: {failure.detail}") from failure

    @asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._timings[name] = time.monotonic() - started


def _number(value: Any) -> float | None:
    """A value that is a number (of numpy or torch, too), as one."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        return None


def _of(error: Exception) -> Outcome:
    return Outcome(cause=Cause.ENVIRONMENT, detail=f"{type(error).__name__}: {error}")


async def canary(environment: Environment, bounds: Bounds) -> bool:
    """Whether what an episode shares with others still works: `alive()`, and the gold solution of one task through the
    same verifiers. Without a solution, `alive()` alone."""
    fresh = environment.fresh()
    fresh.task = environment.task
    try:
        what = f"{type(fresh).__name__}.alive"
        if not await guarded(what, Cause.ENVIRONMENT, bounds.setup + bounds.judge, fresh.alive):
            return False
        gold = gold_of(fresh, environment.task)
        if gold is None:
            return True
        run = _Run(fresh, {MAIN: Replay(gold)}, environment.task, Sampling(), "canary", bounds)
        return await _judges_well(run)
    except (Failure, UsageError):
        return False


async def _judges_well(run: _Run) -> bool:
    try:
        await run.play(Loop())
        if run._outcome.cause is not Cause.OK:
            return False
        for judge in judges(type(run._environment)):
            if judge.weight is not None:
                await run._ask(judge)
        return True
    except Failure:
        return False
    finally:
        await run.close()
