"""The Engine over any causal language model of transformers: batches of whole prompts, decoded together.

Plain where ours is fast: a turn costs all of the conversation's tokens again, and who arrives waits for the next batch.
"""

from __future__ import annotations

import asyncio
import time

import torch
from torch import Tensor

from palaestra.model.foreign import Foreign
from palaestra.rollout.engine import WeightSource
from palaestra.rollout.local_engine import LocalEngine
from palaestra.rollout.requests import Request, draw_for, fail


class TransformersEngine(LocalEngine[list[tuple[str, Tensor]]]):
    """At most `slots` conversations a batch (1 in a deterministic run: a row owes nothing to its neighbours), of at
    most `context` tokens each."""

    def __init__(self, model: Foreign, slots: int, context: int, deterministic: bool = False) -> None:
        super().__init__(context)
        self._model = model
        self._slots = 1 if deterministic else slots

    async def fork(self, session: str, new: str) -> None:
        """Nothing is kept between calls, so there is nothing to copy."""

    async def release(self, session: str) -> None:
        """See Engine.release."""
        await self.cancel(session)

    async def prepare(self, weights: WeightSource, version: int) -> None:
        """See Engine.prepare. Not in the thread, which a whole batch may hold."""
        self._prepared = (version, list(weights))

    async def _run(self) -> None:
        """Batches of waiting requests, first come first served, until none waits."""
        try:
            while self._waiting:
                await asyncio.sleep(0)
                self._active, self._waiting = self._waiting[: self._slots], self._waiting[self._slots :]
                started = time.monotonic()
                await self._in_thread(self._play, self._active)
                self._busy += time.monotonic() - started
                for request in self._active:
                    request.answer()
                self._active = []
                await asyncio.sleep(0)
        except Exception as error:
            fail([*self._waiting, *self._active], error)
            self._waiting, self._active = [], []

    def _use(self, built: list[tuple[str, Tensor]]) -> None:
        self._model.load_weights(built)

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
