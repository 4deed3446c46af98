"""The Engine over any causal language model of transformers: batches of whole prompts, decoded together.

Plain where ours is fast: a turn costs all of the conversation's tokens again, and who arrives waits for the next batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palaestra.gym.types import Generation, Sampling
from palaestra.model.foreign import Foreign
from palaestra.rollout.engine import WeightSource
from palaestra.rollout.requests import Request, compute_thread, draw_for, fail


class TransformersEngine:
    """At most `slots` conversations a batch (1 in a deterministic run: a row owes nothing to its neighbours), of at
    most `context` tokens each."""

    def __init__(self, model: Foreign, slots: int, context: int, deterministic: bool = False) -> None:
        self._model = model
        self._slots = 1 if deterministic else slots
        self._context = context
        self._prepared: tuple[int, list[tuple[str, Tensor]]] | None = None
        self._committing: tuple[int, list[tuple[str, Tensor]]] | None = None
        self.version = 0
        self._waiting: list[Request] = []
        self._batch: list[Request] = []
        self._loop: asyncio.Task[None] | None = None
        self._thread = compute_thread()
        self._counts = {"drawn": 0, "prefilled": 0, "steps": 0}
        self._busy = 0.0

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation:
        """See Engine.generate."""
        request = Request.of(ids, sampling, session, self._context)
        self._waiting.append(request)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return await request.result()

    async def fork(self, session: str, new: str) -> None:
        """Nothing is kept between calls, so there is nothing to copy."""

    async def cancel(self, session: str) -> None:
        """See Engine.cancel."""
        for request in [*self._waiting, *self._batch]:
            if request.session == session and request.finish is None:
                request.finish = "cancelled"

    async def release(self, session: str) -> None:
        """See Engine.release."""
        await self.cancel(session)

    async def prepare(self, weights: WeightSource, version: int) -> None:
        """See Engine.prepare."""
        self._prepared = (version, list(weights))

    async def commit(self, version: int) -> None:
        """See Engine.commit. Takes effect between two steps of a batch."""
        if self._prepared is None or self._prepared[0] != version:
            ready = None if self._prepared is None else self._prepared[0]
            raise ValueError(f"commit({version}): prepared is {ready}; call prepare(weights, {version}) first")
        self._committing, self._prepared = self._prepared, None
        if not self._batch:
            await self._in_thread(self._switch)

    def stats(self) -> Mapping[str, Any]:
        """See Engine.stats."""
        return {**self._counts, "sessions": 0, "version": self.version, "busy": self._busy}

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _run(self) -> None:
        """Batches of waiting requests, those of like length together, until none waits."""
        try:
            while self._waiting:
                await asyncio.sleep(0)
                self._waiting.sort(key=lambda request: len(request.ids))
                self._batch, self._waiting = self._waiting[: self._slots], self._waiting[self._slots :]
                started = time.monotonic()
                await self._in_thread(self._play, self._batch)
                self._busy += time.monotonic() - started
                for request in self._batch:
                    request.answer()
                self._batch = []
                await asyncio.sleep(0)
        except Exception as error:
            fail([*self._waiting, *self._batch], error)
            self._waiting, self._batch = [], []

    def _switch(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            version, weights = committing
            self._model.load_weights(weights)
            self.version = version

    @torch.inference_mode()
    def _play(self, requests: list[Request]) -> None:
        """Prefill left-padded prompts, then a token a step for each request until all have finished; rows that have are
        dropped whenever they are half of what is left."""
        self._switch()
        live = [request for request in requests if request.finish is None]
        if not live:
            return
        longest = max(len(request.ids) for request in live)
        ids = torch.tensor([[0] * (longest - len(request.ids)) + request.ids for request in live])
        seen = torch.tensor([[0] * (longest - len(r.ids)) + [1] * len(r.ids) for r in live])
        self._counts["prefilled"] += int(seen.sum())
        cache = None
        while True:
            places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self._model.inner(
                input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache = output.past_key_values
            self._draw(live, output.logits[:, -1].float())
            left = [row for row, request in enumerate(live) if request.finish is None]
            if not left:
                return
            if 2 * len(left) <= len(live):
                rows = torch.tensor(left)
                cache.batch_select_indices(rows)
                live, seen = [live[row] for row in left], seen[rows]
            ids = torch.tensor([request.ids[-1:] for request in live])
            seen = torch.cat([seen, torch.ones_like(ids)], dim=-1)
            self._switch()

    def _draw(self, requests: list[Request], logits: Tensor) -> None:
        self._counts["steps"] += 1
        for request, token, logprob in zip(requests, *draw_for(requests, logits), strict=True):
            if request.finish is None:
                request.take(token, logprob, self.version, self._context)
                self._counts["drawn"] += 1
