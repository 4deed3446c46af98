"""LatentMoE: a sigmoid router over experts that work in a narrower latent space, beside one shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palaestra.kernels.experts import Routing, route_plain
from palaestra.model.config import ModelConfig
from palaestra.model.layers import MLP, Linear, relu2


class Router(nn.Module):
    """Scores sigmoid(W x) in float32; the correction bias takes part in the choice alone.

    `load` int64[E] counts the choices of every forward pass in training mode since it was last zeroed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._routing = Routing(
            top=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)
        self.e_score_correction_bias: Tensor
        self.load: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float[T, hidden] -> chosen experts int64[T, k] and their weights float32[T, k]."""
        logits = F.linear(x.float(), self.weight.float())
        chosen, weights = route_plain(logits, self.e_score_correction_bias, self._routing)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        return chosen, weights


class Experts(nn.Module):
    """The routed experts, stacked [E, out, in] in memory; their names on disk are one matrix an expert."""

    seen_up: Tensor | None = None
    seen_down: Tensor | None = None

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(count, inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The chosen experts' weighted sum: float[T, width], int64[T, k], float[T, k] -> float[T, width]."""
        up = self.up_proj if self.seen_up is None else self.seen_up
        down = self.down_proj if self.seen_down is None else self.seen_down
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(up)).cumsum(0).to(torch.int32)
        k = chosen.shape[1]
        sorted_x = x[order // k]
        hidden = relu2(F.grouped_mm(sorted_x, up.transpose(1, 2), offs=counts))
        outputs = F.grouped_mm(hidden, down.transpose(1, 2), offs=counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        result: Tensor = (outputs[back].unflatten(0, (-1, k)) * weights[..., None]).sum(1).to(x.dtype)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, matrix in self.split(keep_vars):
            destination[prefix + name] = matrix

    def split(self, keep_vars: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Each expert's matrices under their names on disk."""
        for projection in ("up_proj", "down_proj"):
            stacked = getattr(self, projection)
            for index, matrix in enumerate(stacked if keep_vars else stacked.detach()):
                yield f"{index}.{projection}.weight", matrix

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, matrix in self.split():
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
            elif state_dict[prefix + name].shape != matrix.shape:
                error_msgs.append(f"{prefix}{name}: {list(state_dict[prefix + name].shape)}, not {list(matrix.shape)}")
            else:
                matrix.copy_(state_dict[prefix + name])
        known = {prefix + name for name, _ in self.split()}
        unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in known]


class LatentMoE(nn.Module):
    """fc2(sum of chosen experts of fc1(x)) + shared expert of x; without a latent size the experts see x itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.moe_latent_size or config.hidden_size
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, width, config.moe_intermediate_size)
        self.shared_experts = MLP(config.hidden_size, config.moe_shared_expert_intermediate_size)
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = Linear(config.hidden_size, width)
            self.fc2_latent_proj = Linear(width, config.hidden_size)
        self.latent = config.moe_latent_size is not None

    def forward(self, x: Tensor) -> Tensor:
        """float[B, L, hidden] -> the same."""
        flat = x.flatten(0, -2)
        chosen, weights = self.gate(flat)
        routed = self.experts(self.fc1_latent_proj(flat) if self.latent else flat, chosen, weights)
        if self.latent:
            routed = self.fc2_latent_proj(routed)
        result: Tensor = routed.view_as(x) + self.shared_experts(x)
        return result
