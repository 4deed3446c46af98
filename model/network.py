"""The hybrid network: Mamba-2, attention and LatentMoE blocks in the order of a pattern string (Nemotron-H)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palaestra.kernels.layouts import take_modelopt, to_modelopt
from palaestra.kernels.nvfp4 import dequantize, fake_quantize, quantize
from palaestra.model.attention import Attention
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.layers import MLP, Linear, RMSNorm
from palaestra.model.mamba import Mamba
from palaestra.model.moe import Experts, LatentMoE

Named = tuple[str, Tensor]


def _mixer(letter: str, config: ModelConfig) -> nn.Module:
    if letter == "-":
        return MLP(config.hidden_size, config.intermediate_size)
    return {"M": Mamba, "*": Attention, "E": LatentMoE}[letter](config)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, letter: str, config: ModelConfig) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(letter, config)

    def forward(self, x: Tensor, lengths: Tensor | None, cache: Cache | None, index: int) -> Tensor:
        """float[B, L, hidden] -> the same."""
        normed = self.norm(x)
        state = None if cache is None else cache.layers.get(index)
        if self.letter == "M":
            mixed = self.mixer(normed, lengths, state)
        elif self.letter == "*":
            mixed = self.mixer(normed, state, cache)
        else:
            mixed = self.mixer(normed)
        result: Tensor = x + mixed
        return result


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
        self._initialise()

    def forward(self, ids: Tensor, lengths: Tensor | None = None, cache: Cache | None = None) -> Tensor:
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
        given |= {name: dequantize(matrix) for name, matrix in take_modelopt(given).items()}
        self.load_state_dict(given)

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
