"""The Engine protocol: ids in, sampled ids out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from palaestra.gym.types import Generation, Sampling

WeightSource = Iterable[tuple[str, Tensor]]
"""Published weights: names on disk with their tensors, quantised ones as ModelOpt's triples."""


class Engine(Protocol):
    """Whatever draws tokens. A session keeps the state of a conversation between calls, so that a turn costs only its
    new tokens; a lost session is rebuilt from the ids."""

    async def generate(self, ids: Sequence[int], sampling: Sampling, session: str) -> Generation:
        """Draw a continuation of `ids`, the whole sequence so far. The stop id, where one was drawn, is its last.

        Raises Failure(LIMIT_CONTEXT) if `ids` alone are too long, Failure(CANCELLED) after `cancel`,
        Failure(MODEL_SERVER) if the engine broke, ValueError for sampling that it does not know.
        """
        ...

    async def fork(self, session: str, new: str) -> None:
        """Let `new` continue from where `session` stands. Nothing happens for an unknown session."""
        ...

    async def cancel(self, session: str) -> None:
        """End the session's generation under way, if there is one."""
        ...

    async def release(self, session: str) -> None:
        """Forget the session. Idempotent."""
        ...

    async def prepare(self, weights: WeightSource, version: int) -> None:
        """Take the weights of a version in beside those in use."""
        ...

    async def commit(self, version: int) -> None:
        """Switch to the prepared version; requests in flight go on with it. Raises ValueError if it is another one."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Counters: tokens drawn and prefilled, sessions, seconds busy."""
        ...
