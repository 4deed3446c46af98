"""Ray actors: thin wrappers around the plain objects, and the local stand-ins that callers hold.

An actor that dies is started again by Ray. Who called it raises a Failure whose cause the outcome table knows, once the
actor answers again, so that a retry does not meet a door that is still shut.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import safetensors.torch
from ray.exceptions import RayActorError

from palaestra.gym.agent import MAIN
from palaestra.gym.environment import judges
from palaestra.gym.episode import Bounds
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.registry import EnvironmentSpec, UsageError
from palaestra.gym.types import Episode, Generation, Sampling, Task
from palaestra.rollout.engine import Engine
from palaestra.rollout.policy import TokenPolicy
from palaestra.rollout.pool import PoolError
from palaestra.rollout.worker import Work, Worker

RESTART_SECONDS = 120.0
REQUEST_SECONDS = 600.0
EPISODE_SECONDS = 6 * 3600.0
"""How long an actor that plays an episode without a limit on its time may be silent; one that died says so at once."""
DELIVERIES = 3
"""How often weights are handed to a policy actor that dies while it takes them."""


class Lost(NamedTuple):
    """A Failure as plain data: it crosses processes."""

    cause: Cause
    detail: str


class PolicyActor:
    """An engine in a process of its own. It answers nothing before it has been given weights."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._engine = build()
        self._version: int | None = None

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation | Lost:
        if self._version is None:
            return Lost(Cause.MODEL_SERVER, "the policy actor was started anew and has no weights yet")
        try:
            return await self._engine.generate(ids, sampling, session)
        except Failure as failure:
            return Lost(failure.cause, failure.detail)

    async def tell(self, method: str, *sessions: str) -> None:
        await getattr(self._engine, method)(*sessions)

    async def deliver(self, weights: bytes, version: int) -> None:
        await self._engine.prepare(safetensors.torch.load(weights).items(), version)
        await self._engine.commit(version)
        self._version = version

    async def ready(self) -> bool:
        return self._version is not None


class EnvironmentActor:
    """A worker in a process of its own: plays many episodes at once."""

    def __init__(self, specs: Mapping[str, EnvironmentSpec], policy: Any, renderer: Any, bounds: Bounds) -> None:
        self._worker = Worker(specs, {MAIN: TokenPolicy(renderer, RemoteEngine(policy))}, bounds)

    async def play(self, work: Work) -> Episode | Lost:
        try:
            return await self._worker.play(work)
        except Failure as failure:
            return Lost(failure.cause, failure.detail)

    async def close(self) -> None:
        await self._worker.close()

    async def ready(self) -> bool:
        return True


class RemoteEngine:
    """The Engine behind a PolicyActor's handle."""

    def __init__(self, actor: Any, seconds: float = REQUEST_SECONDS) -> None:
        self._actor = actor
        self._seconds = seconds

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation:
        """See Engine.generate. A dead actor is Failure(MODEL_SERVER)."""
        request = self._actor.generate.remote(list(ids), sampling, session)
        answer = await _answer(request, self._seconds, Cause.MODEL_SERVER, f"the policy actor (session {session})")
        assert isinstance(answer, Generation)
        return answer

    async def fork(self, session: str, new: str) -> None:
        """See Engine.fork."""
        self._actor.tell.remote("fork", session, new)

    async def cancel(self, session: str) -> None:
        """See Engine.cancel."""
        self._actor.tell.remote("cancel", session)

    async def release(self, session: str) -> None:
        """See Engine.release. Nobody waits for it."""
        self._actor.tell.remote("release", session)

    async def prepare(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Only the driver hands out weights (`Cluster.deliver`)."""
        raise NotImplementedError("weights go to the policy actor from the driver")

    async def commit(self, version: int) -> None:
        """Only the driver hands out weights."""
        raise NotImplementedError("weights go to the policy actor from the driver")

    def stats(self) -> Mapping[str, Any]:
        """Nothing is counted on this side."""
        return {}


class Cluster:
    """A policy actor and environment actors that play for it: a Player, and where weights are delivered.

    `policy_cpus` and `environment_cpus` are the shares of a CPU that an actor books; with 0 they take turns.
    """

    def __init__(
        self,
        specs: Mapping[str, EnvironmentSpec],
        build: Callable[[], Engine],
        renderer: Any,
        bounds: Bounds,
        actors: int = 1,
        cpus: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.policy = _remote(PolicyActor, cpus[0]).remote(build)
        kind = _remote(EnvironmentActor, cpus[1])
        self._renderer = ray.put(renderer)  # held here: an actor is started again with what its first start was given
        self.environments = [kind.remote(dict(specs), self.policy, self._renderer, bounds) for _ in range(actors)]
        self._specs, self._bounds = specs, bounds
        self._turn = 0
        self._delivering = asyncio.Lock()
        self._latest: tuple[Any, int] | None = None

    async def play(self, work: Work) -> Episode:
        """Play on the next actor. Raises Failure(ENVIRONMENT) when it died, once it is back.

        An episode that lost its policy actor comes back once that has its weights again.
        """
        self._turn += 1
        actor = self.environments[self._turn % len(self.environments)]
        what = f"the environment actor that played {work.task.environment}"
        try:
            answer = await _answer(actor.play.remote(work), self._seconds(work.task), Cause.ENVIRONMENT, what)
        except Failure as failure:
            if isinstance(failure.__cause__, RayActorError):
                await _until_ready(actor, what)
            raise
        assert isinstance(answer, Episode)
        if answer.outcome.cause is Cause.MODEL_SERVER:
            await self._restore()
        return answer

    def _seconds(self, task: Task) -> float:
        """After so long an actor that plays the task hangs: its own deadlines have passed."""
        spec = self._specs[task.environment]
        kind = spec.environment()
        bounds = self._bounds.at_least(kind(spec.settings()).deadlines(task))
        longest = bounds.longest(task, len(judges(kind)))
        return longest + REQUEST_SECONDS if math.isfinite(longest) else EPISODE_SECONDS

    async def deliver(self, weights: Mapping[str, Any], version: int) -> None:
        """Hand weights to the policy actor; one that is being started again is waited for."""
        async with self._delivering:
            self._latest = ray.put(safetensors.torch.save(dict(weights))), version
            await self._hand_over(*self._latest)

    async def _restore(self) -> None:
        """Give a policy actor that was started anew the latest weights, once for all the episodes that noticed."""
        async with self._delivering:
            if self._latest is not None and not await _until_ready(self.policy, "the policy actor"):
                await self._hand_over(*self._latest)

    async def _hand_over(self, source: Any, version: int) -> None:
        what = "the policy actor, which was given weights,"
        for left in reversed(range(DELIVERIES)):
            await _until_ready(self.policy, "the policy actor")
            try:
                await _answer(self.policy.deliver.remote(source, version), REQUEST_SECONDS, Cause.MODEL_SERVER, what)
                return
            except Failure as failure:
                if not left or not isinstance(failure.__cause__, RayActorError):
                    raise PoolError(failure.detail) from failure

    async def close(self) -> None:
        """Close the environments and end the actors."""
        closing = [actor.close.remote() for actor in self.environments]
        await asyncio.gather(*(_answer(c, 30, Cause.ENVIRONMENT, "close") for c in closing), return_exceptions=True)
        for actor in (*self.environments, self.policy):
            ray.kill(actor)


def connect(address: str) -> None:
    """Join the cluster at `address`, or start one on this machine where it is empty. Idempotent.

    Raises UsageError where no cluster answers.
    """
    if ray.is_initialized():
        return
    where = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, **where)
    except ConnectionError as error:
        raise UsageError(f"ray.address: no cluster lets us in at {address} ({error}); see `ray status`") from None


def _remote(kind: type, cpus: float) -> Any:
    return ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=0, max_concurrency=1000)(kind)


async def _answer(request: Any, seconds: float, cause: Cause, who: str) -> Any:
    """What an actor answers; its death, its silence and the failure it reports become Failure."""
    try:
        answer = await asyncio.wait_for(asyncio.wrap_future(request.future()), seconds)
    except RayActorError as error:
        raise Failure(cause, f"{who} died") from error
    except TimeoutError as error:
        raise Failure(cause, f"{who} did not answer within {seconds:g} s") from error
    if isinstance(answer, Lost):
        raise Failure(answer.cause, answer.detail)
    return answer


async def _until_ready(actor: Any, who: str) -> bool:
    """Wait until an actor answers; the answer says whether it has all that it needs. Raises PoolError after
    RESTART_SECONDS: nothing can go on."""
    deadline = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < deadline:
        try:
            return bool(await _answer(actor.ready.remote(), deadline - time.monotonic(), Cause.MODEL_SERVER, who))
        except Failure:
            await asyncio.sleep(0.2)
    raise PoolError(f"{who} did not start within {RESTART_SECONDS:g} s; has the cluster room for it?")
