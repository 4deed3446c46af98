"""Our engine: continuous batching over the hybrid network, a cache row for every session."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from palaestra.kernels.native import library
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.decoder import Decoder, decoder
from palaestra.rollout.engine import WeightSource
from palaestra.rollout.local_engine import LocalEngine
from palaestra.rollout.requests import Request, draw_for, fail

PROMPTS = 64
"""Prompts that are computed together."""


@dataclass(frozen=True)
class EngineConfig:
    """`slots`: conversations kept at once; `context`: tokens a conversation may have; `burst`: decode steps between two
    looks at what arrived; `deterministic`: no conversation's numbers owe anything to who else is there. So each is
    computed by itself (unless the kernels promise that it does not matter), and one given up for another is kept aside:
    a state computed anew could round otherwise."""

    slots: int = 192
    context: int = 512
    burst: int = 8
    deterministic: bool = False


@dataclass(eq=False)
class _Session:
    """A conversation's row and the ids that its state has seen; `aside`: the state while the row (-1) is another's."""

    row: int
    ids: list[int]
    aside: Cache | None = None


class HybridEngine(LocalEngine[Decoder]):
    """The Engine over our own model, which serves nothing before it has weights: given here, or by `prepare` and
    `commit`. New ones take effect between two bursts."""

    def __init__(
        self, network: ModelConfig, config: EngineConfig | None = None, weights: WeightSource | None = None
    ) -> None:
        self._config = config or EngineConfig()
        super().__init__(self._config.context)
        self._network = network
        self._decoder: Decoder | None = None if weights is None else self._built(list(weights))
        self._cache = Cache.empty(self._network, self._config.slots, 2 * self._config.context)
        self._free = list(range(self._config.slots))[::-1]
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    async def fork(self, session: str, new: str) -> None:
        """See Engine.fork."""
        known = self._sessions.get(session)
        if known is None or any(request.session == session for request in self._active):
            return
        await self.release(new)
        state = self._state(known)
        row = self._take_row()
        if row is not None:
            self._cache.write(torch.tensor([row]), state)
            self._sessions[new] = _Session(row, list(known.ids))

    async def release(self, session: str) -> None:
        """See Engine.release."""
        await self.cancel(session)
        if not any(request.session == session for request in self._active):
            self._drop(session)

    async def prepare(self, weights: WeightSource, version: int) -> None:
        """See Engine.prepare."""
        self._prepared = (version, await self._in_thread(self._built, list(weights)))

    def stats(self) -> Mapping[str, Any]:
        """See Engine.stats."""
        kernels = "" if self._decoder is None else self._decoder.kernels
        return {**super().stats(), "sessions": len(self._sessions), "kernels": kernels}

    # -- the loop

    async def _run(self) -> None:
        """Admit, step, finish, until nothing is left to do."""
        try:
            while self._waiting or self._active:
                admitted = self._admit()
                if not self._active:
                    return  # all that waited were cancelled
                started = time.monotonic()
                await self._in_thread(self._compute, admitted)
                self._busy += time.monotonic() - started
                self._finish()
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        fail([*self._waiting, *self._active], error)
        for session in list(self._sessions):
            self._drop(session)
        self._waiting, self._active = [], []

    def _admit(self) -> list[Request]:
        """Give waiting requests a row, as long as there are rows."""
        admitted: list[Request] = []
        busy = {request.session for request in self._active}
        later: list[Request] = []
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

    def _seat(self, request: Request) -> bool:
        """Find the session's row, or a free one, or that of the session idle for longest."""
        known = self._sessions.get(request.session)
        if known is None or request.ids[: len(known.ids)] != known.ids or len(known.ids) == len(request.ids):
            self._drop(request.session)
            known = _Session(-1, [])
        if known.row < 0:
            row = self._take_row()
            if row is None:
                return False
            if known.aside is not None:
                self._cache.write(torch.tensor([row]), known.aside)
            known.row, known.aside = row, None
        self._sessions[request.session] = known
        self._sessions.move_to_end(request.session)
        request.row = known.row
        return True

    def _take_row(self) -> int | None:
        if not self._free:
            busy = {request.session for request in self._active}
            seated = (session for session, known in self._sessions.items() if known.row >= 0)
            idle = next((session for session in seated if session not in busy), None)
            if idle is None:
                return None
            self._give_up(idle)
        return self._free.pop()

    def _give_up(self, session: str) -> None:
        known = self._sessions[session]
        aside = self._state(known) if self._config.deterministic else None
        self._drop(session)
        if aside is not None:
            self._sessions[session] = _Session(-1, known.ids, aside)

    def _state(self, known: _Session) -> Cache:
        """The state kept aside, or a copy of the row's."""
        return known.aside or self._cache.select(torch.tensor([known.row]), len(known.ids))

    def _drop(self, session: str) -> None:
        known = self._sessions.pop(session, None)
        if known is not None and known.row >= 0:
            self._cache.clear(known.row)
            self._free.append(known.row)

    def _finish(self) -> None:
        for request in [request for request in self._active if request.finish is not None]:
            self._active.remove(request)
            self._answer(request)

    def _answer(self, request: Request) -> None:
        if request.future.done() or request.finish == "cancelled":
            self._drop(request.session)
        request.answer()

    # -- compute, in a thread

    @torch.inference_mode()
    def _compute(self, admitted: list[Request]) -> None:
        """Prefill what was admitted, then up to `burst` decode steps of everything active."""
        self._switch()
        if self._decoder is None:
            raise RuntimeError("the engine has no weights yet: prepare and commit some")
        alone = self._config.deterministic and not self._decoder.invariant
        self._prefill(self._decoder, admitted, 1 if alone else PROMPTS)
        active = [request for request in self._active if request.finish is None]
        for part in [[request] for request in active] if alone else [active]:
            self._decode(self._decoder, part)

    def _decode(self, decoder: Decoder, requests: list[Request]) -> None:
        """Up to `burst` tokens for each request."""
        for _ in range(self._config.burst):
            going = [request for request in requests if request.finish is None]
            if not going:
                break
            ids = torch.tensor([request.ids[-1] for request in going])
            rows = torch.tensor([request.row for request in going])
            self._draw(going, decoder.step(ids, rows, self._cache))

    def _draw(self, requests: list[Request], logits: torch.Tensor) -> None:
        """One token for every request, from logits float32[requests, vocabulary]."""
        self._counts["steps"] += 1
        for request, token, logprob in zip(requests, *draw_for(requests, logits), strict=True):
            if request.finish is None:  # it may have been cancelled meanwhile
                self._sessions[request.session].ids.append(request.ids[-1])
                request.take(token, logprob, self.version, self._config.context)
                self._counts["drawn"] += 1

    def _prefill(self, decoder: Decoder, admitted: list[Request], size: int) -> None:
        """Bring every admitted row up to all of its ids but the last, `size` rows at a time; equal fresh prompts are
        computed once."""
        first: dict[tuple[int, ...], Request] = {}
        copies: list[tuple[int, int]] = []
        todo: list[Request] = []
        for request in admitted:
            known = self._sessions[request.session]
            if known.ids or (twin := first.setdefault(tuple(request.ids[:-1]), request)) is request:
                todo.append(request)
            else:
                copies.append((request.row, twin.row))
        todo.sort(key=lambda request: len(request.ids) - len(self._sessions[request.session].ids))
        for start in range(0, len(todo), size):
            self._prefill_together(decoder, todo[start : start + size])
        if copies:
            to, source = (torch.tensor(part) for part in zip(*copies, strict=True))
            self._cache.write(to, self._cache.select(source, max(len(request.ids) for request in admitted)))
        for request in admitted:
            self._sessions[request.session].ids = request.ids[:-1]

    def _prefill_together(self, decoder: Decoder, requests: list[Request]) -> None:
        news = {request.row: request.ids[len(self._sessions[request.session].ids) : -1] for request in requests}
        news = {row: new for row, new in news.items() if new}
        if news:
            decoder.prefill(list(news.values()), list(news), self._cache)
            self._counts["prefilled"] += sum(map(len, news.values()))

    # -- weights

    def _built(self, weights: list[tuple[str, torch.Tensor]]) -> Decoder:
        return decoder(self._network, dict(weights), library())

    def _use(self, built: Decoder) -> None:
        self._decoder = built
