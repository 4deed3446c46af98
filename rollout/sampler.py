"""Drawing tokens: a counter-based generator, so that a draw depends on its seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palaestra.gym.types import Sampling
from palaestra.kernels.native import Library, library, pointer


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """float64[n] in [0, 1): the splitmix64 hash (Steele et al., 2014) of each (seed, position)."""
    with np.errstate(over="ignore"):
        state = np.array([seed & (2**64 - 1) for seed in seeds], np.uint64)
        state = _mix(state) + np.array(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def refuse_unknown(sampling: Sampling) -> None:
    """Raises ValueError for settings that no engine of ours can honour."""
    if sampling.json_schema is not None:
        raise ValueError(
            "this engine samples without a grammar: leave json_schema out, or use an endpoint that has one"
        )


def draw(
    logits: Tensor, samplings: Sequence[Sampling], uniform: NDArray[np.float64], histories: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function at `uniform`.

    logits float32[n, vocabulary]; histories: the ids generated so far by each row (for the penalties). Returns ids
    int64[n] and float32[n], the natural log-probabilities under the distribution really sampled; a greedy row
    (temperature 0) reports its token's log-probability at temperature 1.
    """
    temperatures = torch.tensor([sampling.temperature for sampling in samplings])
    pruned = [row for row, sampling in enumerate(samplings) if sampling.pruning()]
    if pruned:
        logits = logits.clone()
    for row in pruned:
        scores = logits[row] / (samplings[row].temperature or 1.0)
        logits[row] = prune(scores, samplings[row], histories[row])
        temperatures[row] = float(samplings[row].temperature > 0)  # they are scaled already
    native = library() if logits.device.type == "cpu" else None
    return _invert(logits, temperatures, uniform) if native is None else _native(native, logits, temperatures, uniform)


def _invert(logits: Tensor, temperatures: Tensor, uniform: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """The draws in PyTorch."""
    temperatures = temperatures.to(logits.device)
    logprobs = torch.log_softmax(logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None], -1)
    cumulative = logprobs.double().exp().cumsum(-1)
    target = torch.from_numpy(uniform).to(logits.device) * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    ids = torch.where(temperatures > 0, ids, logits.argmax(-1))
    return ids, logprobs.gather(1, ids[:, None]).squeeze(-1)


def _native(
    native: Library, logits: Tensor, temperatures: Tensor, uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """The draws in C."""
    count, width = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    at = torch.from_numpy(np.ascontiguousarray(uniform))
    ids, logprobs = torch.empty(count, dtype=torch.int64), torch.empty(count)
    places = pointer(temperatures), pointer(at), pointer(ids), pointer(logprobs)
    if native.draw(logits.data_ptr(), logits.stride(0), width, count, *places, torch.get_num_threads()):
        raise MemoryError(f"no memory for {count} draws of {width} tokens")
    return ids, logprobs


def prune(scores: Tensor, sampling: Sampling, history: Sequence[int]) -> Tensor:
    """Scores float32[vocabulary] under penalties (on generated tokens), top-k, top-p and min-p, in that order."""
    counts = torch.bincount(torch.tensor(history, dtype=torch.int64, device=scores.device), minlength=len(scores))
    scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.top_k:
        scores = scores.masked_fill(scores < scores.topk(min(sampling.top_k, len(scores))).values[-1], -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter_(0, order, outside), -torch.inf)
    return scores.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
