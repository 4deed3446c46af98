"""A generation under way, as every engine keeps it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.types import FinishReason, Generation, Sampling
from palaestra.rollout.sampler import draw, refuse_unknown, uniforms


@dataclass(eq=False)
class Request:
    """`ids` is the whole sequence and grows; the first `prompt` of them were given. `row`: the engine's own."""

    session: str
    ids: list[int]
    prompt: int
    sampling: Sampling
    seed: int
    future: asyncio.Future[Generation]
    row: int = -1
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    finish: FinishReason | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, ids: Sequence[int], sampling: Sampling, session: str, context: int) -> Request:
        """A request of the running loop. Raises Failure(LIMIT_CONTEXT), ValueError for unknown sampling."""
        refuse_unknown(sampling)
        if len(ids) >= context:
            text = f"session {session}: {len(ids)} ids; the engine's context is {context}"
            raise Failure(Cause.LIMIT_CONTEXT, text)
        seed = sampling.seed if sampling.seed is not None else int(np.random.default_rng().integers(2**62))
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        return cls(session, [int(number) for number in ids], len(ids), sampling, seed, future)

    async def result(self) -> Generation:
        """What was drawn. A caller that gives up cancels the request."""
        try:
            return await self.future
        except asyncio.CancelledError:
            self.finish = "cancelled"
            raise

    def take(self, token: int, logprob: float, version: int, context: int) -> None:
        """One more token, drawn by policy `version`; ends the request where a limit or a stop id says so."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append([version, 0])
        self.versions[-1][1] += 1
        if token in self.sampling.stop_ids:
            self.finish = "stop"
        elif len(self.logprobs) >= self.sampling.max_tokens:
            self.finish = "length"
        elif len(self.ids) >= context:
            self.finish = "context"

    def answer(self) -> None:
        """Tell the caller, unless he has given up."""
        if self.future.done():
            return
        if self.finish == "cancelled":
            self.future.set_exception(Failure(Cause.CANCELLED, f"session {self.session} was cancelled"))
            return
        n = len(self.logprobs)
        generation = Generation(
            ids=np.array(self.ids[self.prompt :], np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            sampled=np.ones(n, np.bool_),
            versions=tuple((version, count) for version, count in self.versions),
            finish_reason=self.finish or "stop",
            timing={"seconds": time.monotonic() - self.started},
        )
        self.future.set_result(generation)


def draw_for(requests: Sequence[Request], logits: Tensor) -> tuple[list[int], list[float]]:
    """The next token of each request and its log-probability, from logits float32[requests, vocabulary]."""
    uniform = uniforms([request.seed for request in requests], [len(request.ids) for request in requests])
    histories = [request.ids[request.prompt :] for request in requests]
    drawn, logprobs = draw(logits, [request.sampling for request in requests], uniform, histories)
    return drawn.tolist(), logprobs.tolist()


def fail(requests: Sequence[Request], error: Exception) -> None:
    """Tell every caller that the engine broke."""
    for request in requests:
        if not request.future.done():
            text = f"the engine broke: {type(error).__name__}: {error}"
            request.future.set_exception(Failure(Cause.MODEL_SERVER, text))
