"""Our engine: continuous batching over the hybrid network, a cache row for every session."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from palaestra.gym import threads
from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.types import FinishReason, Generation, Sampling
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.moe import Experts
from palaestra.model.network import Hybrid
from palaestra.rollout.engine import WeightSource
from palaestra.rollout.sampler import draw, refuse_unknown, uniforms


@dataclass(frozen=True)
class EngineConfig:
    """`slots`: conversations kept at once; `context`: tokens a conversation may have; `burst`: decode steps between two
    looks at what arrived; `deterministic`: a row's numbers owe nothing to which other rows it is computed with."""

    slots: int = 192
    context: int = 512
    burst: int = 8
    deterministic: bool = False


@dataclass(eq=False)
class _Request:
    """A generation under way: `ids` grows; the cache row holds all but the last `len(ids) - seen` of them."""

    session: str
    ids: list[int]
    sampling: Sampling
    seed: int
    stops: frozenset[int]
    future: asyncio.Future[Generation]
    prompt: int = 0
    row: int = -1
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    finish: FinishReason | None = None
    started: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Session:
    """A conversation's row and the ids that the row's state has seen."""

    row: int
    ids: list[int]


class HybridEngine:
    """The Engine over `model.network.Hybrid`. Compute runs in a thread; the event loop stays free."""

    def __init__(self, model: Hybrid, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig()
        self._network = model.config
        self._model = self._ready(model)
        self._prepared: tuple[int, Hybrid] | None = None
        self._committing: tuple[int, Hybrid] | None = None
        self.version = 0
        self._cache = Cache.empty(self._network, self._config.slots, 2 * self._config.context)
        self._cache.fixed = self._config.deterministic
        self._free = list(range(self._config.slots))[::-1]
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._waiting: list[_Request] = []
        self._active: list[_Request] = []
        self._loop: asyncio.Task[None] | None = None
        self._counts = {"drawn": 0, "prefilled": 0, "steps": 0}
        self._busy = 0.0

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation:
        """See Engine.generate."""
        refuse_unknown(sampling)
        if len(ids) >= self._config.context:
            raise Failure(
                Cause.LIMIT_CONTEXT,
                f"session {session}: {len(ids)} ids; the engine's context is {self._config.context}",
            )
        seed = sampling.seed if sampling.seed is not None else int(np.random.default_rng().integers(2**62))
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        stops = frozenset(sampling.stop_ids)
        request = _Request(session, [int(i) for i in ids], sampling, seed, stops, future, prompt=len(ids))
        self._waiting.append(request)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            return await future
        except asyncio.CancelledError:
            request.finish = "cancelled"
            raise

    async def fork(self, session: str, new: str) -> None:
        """See Engine.fork."""
        known = self._sessions.get(session)
        if known is None or any(request.session == session for request in self._active):
            return
        await self.release(new)
        row = self._take_row()
        if row is not None and session in self._sessions:
            self._cache.write(torch.tensor([row]), self._cache.select(torch.tensor([known.row])))
            self._sessions[new] = _Session(row, list(known.ids))

    async def cancel(self, session: str) -> None:
        """See Engine.cancel."""
        for request in [*self._waiting, *self._active]:
            if request.session == session and request.finish is None:
                request.finish = "cancelled"

    async def release(self, session: str) -> None:
        """See Engine.release."""
        await self.cancel(session)
        if not any(request.session == session for request in self._active):
            self._drop(session)

    async def prepare(self, weights: WeightSource, version: int) -> None:
        """See Engine.prepare."""
        self._prepared = (version, await threads.call(self._built, list(weights)))

    async def commit(self, version: int) -> None:
        """See Engine.commit. Takes effect between two bursts."""
        if self._prepared is None or self._prepared[0] != version:
            ready = None if self._prepared is None else self._prepared[0]
            raise ValueError(f"commit({version}): prepared is {ready}; call prepare(weights, {version}) first")
        self._committing, self._prepared = self._prepared, None
        if not self._active:
            self._switch()

    def stats(self) -> Mapping[str, Any]:
        """See Engine.stats."""
        return {**self._counts, "sessions": len(self._sessions), "version": self.version, "busy": self._busy}

    # -- the loop

    async def _run(self) -> None:
        """Admit, step, finish, until nothing is left to do."""
        try:
            while self._waiting or self._active:
                self._switch()
                admitted = self._admit()
                if not self._active:
                    await asyncio.sleep(0)
                    continue
                started = time.monotonic()
                await threads.call(self._compute, admitted)
                self._busy += time.monotonic() - started
                self._finish()
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        for request in [*self._waiting, *self._active]:
            if not request.future.done():
                text = f"the engine broke: {type(error).__name__}: {error}"
                request.future.set_exception(Failure(Cause.MODEL_SERVER, text))
        for session in list(self._sessions):
            self._drop(session)
        self._waiting, self._active = [], []

    def _switch(self) -> None:
        if self._committing is not None:
            self.version, self._model = self._committing
            self._committing = None

    def _admit(self) -> list[_Request]:
        """Give waiting requests a row, as long as there are rows."""
        admitted: list[_Request] = []
        busy = {request.session for request in self._active}
        later: list[_Request] = []
        for request in self._waiting:
            if request.finish == "cancelled":
                self._answer(request)
            elif request.session in busy or not self._seat(request):
                later.append(request)
            else:
                busy.add(request.session)
                admitted.append(request)
                self._active.append(request)
        self._waiting = later
        return admitted

    def _seat(self, request: _Request) -> bool:
        """Find the session's row, or a free one, or that of the session idle for longest."""
        known = self._sessions.get(request.session)
        if known is not None and request.ids[: len(known.ids)] == known.ids and len(known.ids) < len(request.ids):
            self._sessions.move_to_end(request.session)
            request.row = known.row
            return True
        self._drop(request.session)
        row = self._take_row()
        if row is None:
            return False
        self._sessions[request.session] = _Session(row, [])
        request.row = row
        return True

    def _take_row(self) -> int | None:
        if not self._free:
            busy = {request.session for request in self._active}
            idle = next((session for session in self._sessions if session not in busy), None)
            if idle is None:
                return None
            self._drop(idle)
        return self._free.pop()

    def _drop(self, session: str) -> None:
        known = self._sessions.pop(session, None)
        if known is not None:
            self._cache.clear(known.row)
            self._free.append(known.row)

    def _finish(self) -> None:
        for request in [request for request in self._active if request.finish is not None]:
            self._active.remove(request)
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        if request.future.done():
            self._drop(request.session)
        elif request.finish == "cancelled":
            self._drop(request.session)
            request.future.set_exception(Failure(Cause.CANCELLED, f"session {request.session} was cancelled"))
        else:
            request.future.set_result(_generation(request))

    # -- compute, in a thread

    @torch.inference_mode()
    def _compute(self, admitted: list[_Request]) -> None:
        """Prefill what was admitted, then up to `burst` decode steps of everything active."""
        self._prefill(admitted)
        rows = torch.tensor([request.row for request in self._active])
        work, places = self._cache, rows
        if not self._config.deterministic:
            work, places = self._cache.select(rows, self._reach()), torch.arange(len(rows))
        for _ in range(self._config.burst):
            if all(request.finish is not None for request in self._active):
                break
            self._step(work, places)
        if work is not self._cache:
            self._cache.write(rows, work)

    def _reach(self) -> int:
        """The longest row after a burst."""
        return min(self._config.context, max(len(request.ids) for request in self._active) + self._config.burst) + 1

    def _prefill(self, admitted: list[_Request]) -> None:
        """Bring every admitted row up to all of its ids but the last; equal fresh prompts are computed once."""
        first: dict[tuple[int, ...], _Request] = {}
        copies: list[tuple[int, int]] = []
        todo: list[_Request] = []
        for request in admitted:
            known = self._sessions[request.session]
            if known.ids or (twin := first.setdefault(tuple(request.ids[:-1]), request)) is request:
                todo.append(request)
            else:
                copies.append((request.row, twin.row))
        size = 1 if self._config.deterministic else 64
        todo.sort(key=lambda request: len(request.ids) - len(self._sessions[request.session].ids))
        for start in range(0, len(todo), size):
            self._prefill_together(todo[start : start + size])
        if copies:
            to, source = (torch.tensor(part) for part in zip(*copies, strict=True))
            self._cache.write(to, self._cache.select(source))
        for request in admitted:
            self._sessions[request.session].ids = request.ids[:-1]

    def _prefill_together(self, requests: list[_Request]) -> None:
        news = [request.ids[len(self._sessions[request.session].ids) : -1] for request in requests]
        longest = max(len(new) for new in news)
        if longest == 0:
            return
        rows = torch.tensor([request.row for request in requests])
        ids = torch.tensor([[*new, *[0] * (longest - len(new))] for new in news])
        lengths = torch.tensor([len(new) for new in news])
        room = max(len(request.ids) for request in requests) + longest
        work = self._cache.select(rows, min(room, self._cache.capacity))
        self._model(ids, lengths, work)
        self._cache.write(rows, work)
        self._counts["prefilled"] += int(lengths.sum())

    def _step(self, work: Cache, places: torch.Tensor) -> None:
        """One token for every active request that has not finished; `places` int64 are the requests' rows in `work`."""
        live = [request.finish is None for request in self._active]
        size = len(work.lengths)
        ids = torch.zeros(size, 1, dtype=torch.int64)
        moves = torch.zeros(size, dtype=torch.int64)
        ids[places, 0] = torch.tensor([request.ids[-1] for request in self._active])
        moves[places] = torch.tensor(live, dtype=torch.int64)
        logits = self._model.logits(self._model(ids, moves, work)[:, 0])[places]
        samplings = [request.sampling for request in self._active]
        uniform = uniforms([r.seed for r in self._active], [len(r.ids) for r in self._active])
        histories = [request.ids[request.prompt :] for request in self._active]
        drawn, logprobs = draw(logits, samplings, uniform, histories)
        self._counts["steps"] += 1
        for request, token, logprob in zip(self._active, drawn.tolist(), logprobs.tolist(), strict=True):
            if request.finish is None:
                self._take(request, token, logprob)

    def _take(self, request: _Request, token: int, logprob: float) -> None:
        self._sessions[request.session].ids.append(request.ids[-1])
        request.ids.append(token)
        request.logprobs.append(logprob)
        self._counts["drawn"] += 1
        if not request.versions or request.versions[-1][0] != self.version:
            request.versions.append([self.version, 0])
        request.versions[-1][1] += 1
        if token in request.stops:
            request.finish = "stop"
        elif len(request.logprobs) >= request.sampling.max_tokens:
            request.finish = "length"
        elif len(request.ids) >= self._config.context:
            request.finish = "context"

    # -- weights

    def _ready(self, model: Hybrid) -> Hybrid:
        for module in model.modules():
            if isinstance(module, Experts):
                module.dense = self._config.deterministic
        return model.eval()

    def _built(self, weights: list[tuple[str, torch.Tensor]]) -> Hybrid:
        model = empty(self._network)
        model.load_weights(weights)
        return self._ready(model)


def empty(config: ModelConfig) -> Hybrid:
    """A model whose weights wait to be loaded; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return Hybrid(config)


def _generation(request: _Request) -> Generation:
    n = len(request.logprobs)
    return Generation(
        ids=np.array(request.ids[request.prompt :], np.int32),
        logprobs=np.array(request.logprobs, np.float32),
        sampled=np.ones(n, np.bool_),
        versions=tuple((version, count) for version, count in request.versions),
        finish_reason=request.finish or "stop",
        timing={"seconds": time.monotonic() - request.started},
    )
