"""The optimiser: Muon for hidden matrices, AdamW for the rest.

Muon orthogonalises the momentum of a matrix by five Newton-Schulz steps (K. Jordan, "Muon", 2024). Its step does not
shrink with the signal: its rate is the knob that decides how much noise reaches the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NOT_HIDDEN = ("embeddings", "lm_head", "conv1d", "gate")


class OptimConfig(BaseModel):
    """Rates and their course: linear warm-up, then constant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    muon: float = Field(default=1e-3, ge=0, description="learning rate of the hidden matrices; 0: AdamW takes them")
    adamw: float = Field(default=1e-4, ge=0, description="learning rate of everything else")
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=5, ge=0, description="steps")
    clip: float = Field(default=1.0, gt=0, description="bound of the gradient's global norm")
    bias_step: float = Field(default=0.0, ge=0, description="step of the router's correction bias; 0 freezes it")


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: float32[..., m, n] of singular values near 1. Zero stays zero."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Parameters: [out, in], or stacked [E, out, in] (each expert by itself)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"])

    def _update(self, parameter: nn.Parameter, rate: float, momentum: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp(average, momentum))
        out, into = parameter.shape[-2:]
        parameter.add_(update, alpha=-rate * max(1.0, out / into) ** 0.5)


def is_router(name: str) -> bool:
    """Whether a parameter steers the choice of experts: frozen in RLVR."""
    return ".gate." in f".{name}" or name.endswith("e_score_correction_bias")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix (or a stack of them) that is neither embedding, head, router nor convolution."""
    return parameter.ndim >= 2 and not any(part in name for part in NOT_HIDDEN)


class Optimiser:
    """Muon and AdamW as one. Parameters without `requires_grad` are left alone."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        moving = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in moving]
        hidden = [p for name, p in moving if config.muon and is_hidden_matrix(name, p)]
        rest = [p for name, p in moving if not (config.muon and is_hidden_matrix(name, p))]
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if hidden:
            self._parts["muon"] = Muon(hidden, config.muon, config.momentum)
        if rest:
            self._parts["adamw"] = torch.optim.AdamW(
                rest, config.adamw, betas=config.betas, weight_decay=config.weight_decay
            )
        self.steps = 0

    def zero(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of all parameters, in order; zeros where there was none, so that every rank has the same."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def step(self) -> float:
        """Clip and update; returns the gradient's norm before clipping."""
        self.steps += 1
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        share = min(1.0, self.steps / self.config.warmup) if self.config.warmup else 1.0
        for name, part in self._parts.items():
            for group in part.param_groups:
                group["lr"] = getattr(self.config, name) * share
            part.step()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {"steps": self.steps, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.steps = state["steps"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
