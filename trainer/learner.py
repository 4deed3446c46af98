"""The learner: fp32 masters, one loss function by name, one optimiser."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from palaestra.trainer.batch import Batch, Micro, micro_batches
from palaestra.trainer.losses import LOSSES, LossConfig, Tokens
from palaestra.trainer.optim import OptimConfig, Optimiser, is_router
from palaestra.trainer.world import Solo, World

Metrics = dict[str, float]
PREDICTION = "mtp."
"""Of the multi-token-prediction head."""


class Trainable(Protocol):
    """What the learner needs of a network: model.network.Hybrid, or any nn.Module shaped like it."""

    def hidden(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states float32[B, L, hidden] of right-padded ids int64[B, L]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[..., vocab]."""
        ...

    def quantised(self) -> AbstractContextManager[Any]:
        """Forward passes inside run on the published values; gradients flow to the masters."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is published: on-disk names and copies of the tensors, quantised once."""
        ...


class LearnerConfig(BaseModel):
    """How a batch is cut (none of which changes what is learned, `updates` aside), and what moves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    micro_tokens: int = Field(default=8192, ge=1, description="padded tokens of a micro-batch")
    updates: int = Field(default=1, ge=1, description="optimiser updates a step; the batch is split among them")
    train_router: bool = Field(default=False, description="whether the router and its bias move (never in RLVR)")
    mtp_factor: float = Field(
        default=0.3,
        ge=0,
        description="of the multi-token-prediction loss in supervised training, where there is a head",
    )
    loss: LossConfig = LossConfig()
    temperature: float = Field(default=1.0, gt=0, description="what the sampler divided its logits by")


class Learner:
    """Turns batches into updates.

    With several ranks every rank gets the whole batch, takes each size-th sequence and sums what it found with the
    others', so that the update is the one of a single process.
    """

    def __init__(
        self, model: Trainable, loss: str, config: LearnerConfig, optim: OptimConfig, world: World | None = None
    ) -> None:
        assert isinstance(model, nn.Module)
        self.model: Any = model
        self.config = config
        self._loss = LOSSES[loss]
        self._world = world or Solo()
        self._foretells = loss == "sft" and config.mtp_factor > 0 and getattr(model, "mtp", None) is not None
        model.train(config.train_router)
        for name, parameter in model.named_parameters():
            moves = config.train_router or not is_router(name)
            parameter.requires_grad_(moves and (self._foretells or not name.startswith(PREDICTION)))
        self.optimiser = Optimiser(model, optim)

    @property
    def device(self) -> torch.device:
        """Where the masters are."""
        return next(iter(self.model.parameters())).device  # type: ignore[no-any-return]

    def step(self, batch: Batch) -> Metrics:
        """Learn from a batch: `config.updates` optimiser updates; a batch without loss tokens changes nothing.

        Returns the step's measurements: means are over all tokens that carry loss.
        """
        started = time.monotonic()
        if not batch.tokens:
            return {"tokens": 0.0, "learn_seconds": 0.0}
        rows = range(len(batch.sequences))
        parts = [rows[part :: self.config.updates] for part in range(self.config.updates)]
        old = self.logprobs(batch) if len(parts) > 1 else None
        measured = [self._update(batch, part, old) for part in parts if part]
        metrics = {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}
        return metrics | {"tokens": float(batch.tokens), "learn_seconds": time.monotonic() - started}

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> list[Tensor]:
        """The log-probabilities float32[tokens with loss] of every sequence under the weights as they are."""
        found: list[Tensor] = [torch.zeros(0)] * len(batch.sequences)
        with self.model.quantised():
            for micro in micro_batches(batch.sequences, range(len(batch.sequences)), self.config.micro_tokens):
                lp, _ = self._judged(micro, self._hidden(micro))
                for row, part in zip(micro.rows, lp.split(micro.loss.sum(1).tolist()), strict=True):
                    found[row] = part
        return found

    def weights(self) -> dict[str, Tensor]:
        """A snapshot of the published weights, quantised once; nobody downstream quantises again."""
        return dict(self.model.weights())

    def state_dict(self) -> dict[str, Any]:
        """The fp32 masters under their in-memory names, the buffers, and the optimiser."""
        masters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        return {"masters": masters, "buffers": buffers, "optimiser": self.optimiser.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises KeyError naming a parameter that it lacks."""
        for name, tensor in self.model.named_parameters():
            tensor.copy_(state["masters"][name])
        for name, tensor in self.model.named_buffers():
            tensor.copy_(state["buffers"][name])
        self.optimiser.load_state_dict(state["optimiser"])

    def _update(self, batch: Batch, rows: Sequence[int], old: list[Tensor] | None) -> Metrics:
        """One optimiser update over the sequences `rows`. Those of advantage 0 are measured without gradient; where all
        are, nothing moves (Muon's momentum alone would take a full step)."""
        count = sum(int(batch.sequences[row].loss.sum()) for row in rows)
        mine = rows[self._world.rank :: self._world.size]
        quiet = [row for row in mine if batch.sequences[row].advantage == 0]
        loud = [row for row in mine if batch.sequences[row].advantage != 0]
        tally = _Tally()
        self.optimiser.zero()
        with self.model.quantised():
            for micro in micro_batches(batch.sequences, loud, self.config.micro_tokens):
                (self._measure(micro, old, tally) / count).backward()
            with torch.no_grad():
                for micro in micro_batches(batch.sequences, quiet, self.config.micro_tokens):
                    self._measure(micro, old, tally)
        silent = all(batch.sequences[row].advantage == 0 for row in rows)
        return tally.means(self._world, count) | {"grad_norm": 0.0 if silent else self._apply()}

    def _measure(self, micro: Micro, old: list[Tensor] | None, tally: _Tally) -> Tensor:
        """The micro-batch's summed loss."""
        hidden = self._hidden(micro)
        lp, entropy = self._judged(micro, hidden)
        before = lp.detach() if old is None else torch.cat([old[row] for row in micro.rows])
        mu = micro.mu[micro.loss].to(lp.device)
        advantage = micro.advantage.repeat_interleave(micro.loss.sum(1)).to(lp.device)
        loss, found = self._loss(Tokens(lp, before, mu, advantage), self.config.loss)
        if self._foretells:
            further = self._foretold(micro, hidden)
            loss, found = loss + self.config.mtp_factor * further, {**found, "mtp_loss": further.detach()}
        tally.add({**found, "loss": loss.detach(), "entropy": entropy.sum()}, (before - mu).abs())
        return loss

    def _hidden(self, micro: Micro) -> Tensor:
        hidden: Tensor = self.model.hidden(micro.ids.to(self.device), micro.lengths.to(self.device))
        return hidden

    def _judged(self, micro: Micro, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and (without gradient) entropy, float32[tokens with loss], row by row."""
        ids = micro.ids.to(self.device)
        rows, places = micro.loss.to(self.device).nonzero(as_tuple=True)
        logits = self.model.logits(hidden[rows, places - 1]).float() / self.config.temperature
        table = logits.log_softmax(-1)
        lp = table.gather(-1, ids[rows, places, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(table.exp() * table).sum(-1)
        return lp, entropy

    def _foretold(self, micro: Micro, hidden: Tensor) -> Tensor:
        """The mean over the prediction depths of their cross entropies, each summed over the tokens that carry loss and
        that it can see (Gloeckle et al., arXiv 2404.19737; one block for all depths, as Nemotron 3 has it)."""
        ids, depths = micro.ids.to(self.device), self.model.further(micro.ids.to(self.device), hidden)
        total = hidden.new_zeros(())
        for depth, states in enumerate(depths, 1):
            rows, places = micro.loss[:, depth + 1 :].to(self.device).nonzero(as_tuple=True)
            logits = self.model.logits(states[rows, places])
            total = total + F.cross_entropy(logits, ids[rows, places + depth + 1], reduction="sum")
        return total / max(len(depths), 1)

    def _apply(self) -> float:
        """Sum the gradients over the ranks and update; returns their norm."""
        for gradient in self.optimiser.gradients():
            self._world.sum(gradient)
        norm = self.optimiser.step()
        self._balance()
        return norm

    @torch.no_grad()
    def _balance(self) -> None:
        """Move each router's correction bias towards an even load (counted since the last update)."""
        for module in self.model.modules():
            if isinstance(getattr(module, "load", None), Tensor):
                load = self._world.sum(module.load).float()
                module.e_score_correction_bias += self.optimiser.config.bias_step * torch.sign(load.mean() - load)
                module.load.zero_()


class _Tally:
    """Sums over the tokens of one update, and the gaps |old - mu| token by token."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._gaps: list[Tensor] = []

    def add(self, sums: dict[str, Tensor], gaps: Tensor) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        self._gaps.append(gaps.cpu())

    def means(self, world: World, count: int) -> Metrics:
        """Means over all ranks' tokens; every rank must have had a sequence."""
        names = sorted(self._sums)
        totals = world.sum(torch.stack([self._sums[name] for name in names])) / count
        metrics = dict(zip(names, totals.tolist(), strict=True))
        if "mismatch_kl" in metrics:
            gaps = world.gather(torch.cat(self._gaps)).sort().values
            metrics["logprob_gap"] = float(gaps.mean())
            metrics["logprob_gap_p999"] = float(gaps[min(len(gaps) - 1, int(0.999 * len(gaps)))])
        return metrics
