"""A token policy: a renderer and an engine make a Policy."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from palaestra.gym.policy import ToolDeclaration
from palaestra.gym.types import Completion, FinishReason, Generation, Message, Sampling, Turn
from palaestra.model.renderer import Renderer
from palaestra.rollout.engine import Engine

LOOK_FOR_STOP_EVERY = 16


class TokenPolicy:
    """Replies by drawing tokens. Stop strings are its own: it cuts after the token that completes one.

    `sha256` is that of its weights, where they do not change: no evaluation takes another's replies as its own then.
    """

    def __init__(self, renderer: Renderer, engine: Engine, sha256: str = "") -> None:
        self.renderer = renderer
        self.engine = engine
        self.sha256 = sha256

    async def reply(
        self,
        path: Sequence[Turn],
        new: Sequence[Message],
        tools: Sequence[ToolDeclaration],
        sampling: Sampling,
        session: str,
    ) -> Completion:
        """See Policy.reply. Raises ValueError for a path of turns that hold no ids."""
        started = time.monotonic()
        past = sequence(path)
        if path:
            added = self.renderer.extend(past, new, sampling.thinking)
        else:
            added = self.renderer.start(new, tools, sampling.thinking)
        known = sampling.model_copy(update={"stop_ids": (*sampling.stop_ids, *self.renderer.stop_ids)})
        generation = await self._generate([*past, *added], known, session)
        message = self.renderer.parse(generation.ids.tolist(), tools)
        usage = {"prompt_tokens": len(past) + len(added), "completion_tokens": len(generation.ids)}
        reason: FinishReason = generation.finish_reason
        if reason == "stop" and message.tool_calls:
            reason = "tool_calls"
        timing = {"seconds": time.monotonic() - started}
        return Completion(message, np.array(added, np.int32), generation, reason, timing, usage)

    async def release(self, session: str) -> None:
        """Let the engine forget the session."""
        await self.engine.release(session)

    async def _generate(self, ids: list[int], sampling: Sampling, session: str) -> Generation:
        if not sampling.stop:
            return await self.engine.generate(ids, sampling, session)
        pieces: list[Generation] = []
        drawn: list[int] = []
        while True:
            left = min(LOOK_FOR_STOP_EVERY, sampling.max_tokens - len(drawn))
            step = sampling.model_copy(update={"max_tokens": left})
            piece = await self.engine.generate([*ids, *drawn], step, session)
            pieces.append(piece)
            drawn += piece.ids.tolist()
            end = self._completes_stop(drawn, sampling.stop)
            if end is not None:
                return _cut(_joined(pieces), end)
            if piece.finish_reason != "length" or len(drawn) >= sampling.max_tokens:
                return _joined(pieces)

    def _completes_stop(self, drawn: list[int], stops: Sequence[str]) -> int | None:
        """The number of tokens up to the one that completes a stop string."""
        if not any(stop in self.renderer.decode(drawn) for stop in stops):
            return None
        return next(n for n in range(1, len(drawn) + 1) if any(s in self.renderer.decode(drawn[:n]) for s in stops))


def sequence(path: Sequence[Turn]) -> list[int]:
    """The ids of a path: prompt and generation, turn by turn. Raises ValueError where a turn holds none."""
    ids: list[int] = []
    for turn in path:
        completion = turn.completion
        if completion.prompt_ids is None or completion.generation is None:
            raise ValueError("a token policy cannot go on from a turn without ids; one policy must play a whole path")
        ids += completion.prompt_ids.tolist()
        ids += completion.generation.ids.tolist()
    return ids


def _joined(pieces: Sequence[Generation]) -> Generation:
    versions: list[tuple[int, int]] = []
    for version, count in (span for piece in pieces for span in piece.versions):
        if versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        else:
            versions.append((version, count))
    return Generation(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.logprobs for piece in pieces]),
        np.concatenate([piece.sampled for piece in pieces]),
        tuple(versions),
        pieces[-1].finish_reason,
    )


def _cut(generation: Generation, n: int) -> Generation:
    versions: list[tuple[int, int]] = []
    left = n
    for version, count in generation.versions:
        if left > 0:
            versions.append((version, min(count, left)))
        left -= count
    return Generation(
        generation.ids[:n], generation.logprobs[:n], generation.sampled[:n], tuple(versions), "stop", generation.routing
    )
