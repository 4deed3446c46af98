"""The hybrid network: Mamba-2, attention and LatentMoE blocks in the order of a pattern string (Nemotron-H)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palaestra.kernels.layouts import to_modelopt
from palaestra.kernels.nvfp4 import fake_quantize, quantize
from palaestra.model.block import Block
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.layers import Linear, RMSNorm, stays_float32
from palaestra.model.moe import Experts, Router
from palaestra.model.mtp import Prediction
from palaestra.model.shards import Named
from palaestra.model.stored import names, values, weight


class Backbone(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(letter, config) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, lengths: Tensor | None, cache: Cache | None) -> Tensor:
        """int64[B, L] -> float[B, L, hidden]."""
        x = self.embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, lengths, cache, index)
        result: Tensor = self.norm_f(x)
        return result


class Hybrid(nn.Module):
    """A causal language model. `state_dict()` speaks the names of published checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = Prediction(config) if config.num_nextn_predict_layers else None
        self._initialise()

    @classmethod
    def empty(cls, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Hybrid:
        """One whose weights are yet to be written. Matrices are of that dtype, the router's aside, which is float32 as
        all vectors are."""
        with torch.device("meta"):
            model = cls(config)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_float32(name, parameter) else dtype)
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, Router):
                module.load.zero_()
        return model

    def forward(self, ids: Tensor, lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits float32[B, L, vocabulary] of right-padded sequences; arguments as of `hidden`."""
        return self.logits(self.hidden(ids, lengths, cache))

    def hidden(self, ids: Tensor, lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states of right-padded sequences.

        ids int64[B, L]; lengths int64[B], the tokens of each row that are no padding (None: all; 0 leaves a row as it
        is); cache: the rows' past, extended in place. Returns float32[B, L, hidden]; values at padding mean nothing.
        One token a row with a cache is the recurrent step. Raises ValueError when the cache is full.
        """
        hidden: Tensor = self.backbone(ids, lengths, cache)
        if cache is not None:
            cache.lengths += ids.shape[1] if lengths is None else lengths
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., hidden] -> float32[..., vocabulary]."""
        result: Tensor = self.lm_head(hidden).float()
        return result

    def further(self, ids: Tensor, hidden: Tensor) -> list[Tensor]:
        """Hidden states of the prediction depths: the one of depth d float[B, L - d, hidden], whose logits at t are of
        the token t + d + 1. ids int64[B, L]; hidden float[B, L, hidden], the trunk's. Raises ValueError where there is
        no prediction head."""
        if self.mtp is None:
            raise ValueError("this model has no multi-token-prediction head (num_nextn_predict_layers is 0)")
        found: list[Tensor] = []
        for depth in range(1, min(self.config.mtp_depths, ids.shape[1] - 1) + 1):
            hidden = self.mtp(hidden[:, :-1], self.backbone.embeddings(ids[:, depth:]))
            found.append(hidden)
        return found

    @contextmanager
    def quantised(self) -> Iterator[None]:
        """Run forward passes on the dequantised NVFP4 values of the weights that the configuration names; gradients go
        straight through to the float32 masters. The values are computed once, on entering."""
        for holder, attribute, seen, _ in self._quantised_parameters():
            setattr(holder, seen, fake_quantize(getattr(holder, attribute)))
        try:
            yield
        finally:
            for holder, _, seen, _ in self._quantised_parameters():
                setattr(holder, seen, None)

    @torch.no_grad()
    def weights(self, nvfp4: bool = True) -> Iterator[Named]:
        """What a sampler needs, under the names on disk: quantised weights in ModelOpt's layout (kernels/layouts.py),
        float32 for the rest. All are copies."""
        quantised = self._quantised_names() if nvfp4 else set()
        for name, tensor in self.state_dict().items():
            if name not in quantised:
                yield name, tensor.clone()
                continue
            yield from to_modelopt(name, quantize(tensor)).items()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[Named]) -> None:
        """Take over weights as `weights()` gives them. Raises RuntimeError naming missing and unexpected ones."""
        given = dict(weights)
        self.load_state_dict({name: values(weight(given, name)) for name in names(given)})

    def _quantised_parameters(self) -> Iterator[tuple[nn.Module, str, str, str]]:
        """(holder, parameter, where the forward pass looks for its stand-in, name on disk)."""
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                for attribute, seen in (("up_proj", "seen_up"), ("down_proj", "seen_down")):
                    if self.config.quantises(f"{name}.{attribute}"):
                        yield module, attribute, seen, f"{name}.{attribute}"
            elif isinstance(module, Linear) and self.config.quantises(name):
                yield module, "weight", "seen", f"{name}.weight"

    def _quantised_names(self) -> set[str]:
        names: set[str] = set()
        for holder, attribute, _, name in self._quantised_parameters():
            if isinstance(holder, Experts):
                stem = name.removesuffix(f".{attribute}")
                names |= {f"{stem}.{part}" for part, _ in holder.split() if f".{attribute}." in part}
            else:
                names.add(name)
        return names

    @torch.no_grad()
    def _initialise(self) -> None:
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in name:
                parameter.normal_(std=config.initializer_range)
            if config.rescale_prenorm_residual and name.endswith(("out_proj.weight", "o_proj.weight")):
                parameter.div_(math.sqrt(len(config.hybrid_override_pattern)))
