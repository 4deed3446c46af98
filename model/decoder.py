"""A model that goes on from cached states: in C, as one call over packed weights, or in PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from palaestra.kernels import native
from palaestra.kernels.linear import Packed, Weight, pack
from palaestra.kernels.memory import Arena
from palaestra.kernels.native import TILE, TORCH, Library, pointer
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.model.stored import names, weight

TOGETHER = 2048
"""Tokens of prompts that one call computes: so much memory it takes beside the weights."""


class Decoder(Protocol):
    """Continues conversations. `kernels`: what computes. `invariant`: no number depends on what else is in the batch,
    nor on how a conversation's tokens were divided among calls."""

    kernels: str
    invariant: bool

    def step(self, ids: Tensor, rows: Tensor, cache: Cache) -> Tensor:
        """Logits float32[n, vocabulary] after one more token, ids int64[n], of each of the cache's rows int64[n], which
        are all different. Raises ValueError when the cache is full, IndexError for an id beyond the vocabulary."""
        ...

    def prefill(self, news: Sequence[Sequence[int]], rows: Sequence[int], cache: Cache) -> None:
        """Bring the cache's rows forward by new ids each, at least one. Raises as step."""
        ...


def decoder(config: ModelConfig, weights: Mapping[str, Tensor], library: Library | None) -> Decoder:
    """The fastest for the weights of that configuration, as `Hybrid.weights` gives them."""
    if library is not None and fits(config):
        return NativeDecoder(library, config, {name: weight(weights, name) for name in names(weights)})
    return PlainDecoder.of(config, weights)


def fits(config: ModelConfig) -> bool:
    """Whether the kernels take a model of these widths: all must be multiples of 16."""
    widths = [config.hidden_size, config.head_dim, config.mamba_head_dim, config.ssm_state_size]
    widths += [config.mamba_width // config.n_groups, config.intermediate_size, config.moe_intermediate_size]
    widths += [config.moe_shared_expert_intermediate_size, config.moe_latent_size or 0]
    return not any(width % TILE for width in widths)


class PlainDecoder:
    """In PyTorch, over the network itself, on copies of the rows."""

    kernels = TORCH
    invariant = False

    def __init__(self, model: Hybrid) -> None:
        self._model = model.eval()

    @classmethod
    def of(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> PlainDecoder:
        """Over a network with those weights; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            model = Hybrid(config)
        model.load_weights(weights.items())
        return cls(model)

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Tensor, cache: Cache) -> Tensor:
        """See Decoder.step."""
        work = cache.select(rows, int(cache.lengths[rows].max()) + 1)
        logits: Tensor = self._model(ids[:, None], None, work)[:, 0]
        cache.write(rows, work)
        return logits

    @torch.no_grad()
    def prefill(self, news: Sequence[Sequence[int]], rows: Sequence[int], cache: Cache) -> None:
        """See Decoder.prefill."""
        longest = max(len(new) for new in news)
        ids = torch.tensor([[*new, *[0] * (longest - len(new))] for new in news])
        lengths, at = torch.tensor([len(new) for new in news]), torch.tensor(rows)
        work = cache.select(at, min(int(cache.lengths[at].max()) + longest, cache.capacity))
        self._model.hidden(ids, lengths, work)
        cache.write(at, work)


class NativeDecoder:
    """In C. `weights`: every weight under its name on disk, float32 or NVFP4."""

    invariant = True

    def __init__(self, library: Library, config: ModelConfig, weights: Mapping[str, Weight]) -> None:
        self.kernels = library.tier
        self._library = library
        self._config = config
        self._weights = weights
        self._kept: list[Any] = []  # what the records point to
        self._arena = Arena()
        self._past: tuple[Cache, native.Cache] | None = None
        layers = [self._layer(index, letter) for index, letter in enumerate(config.hybrid_override_pattern)]
        self._model = native.Model(
            layers=self._array(native.Layer, layers),
            embeddings=self._vector("backbone.embeddings.weight"),
            norm=self._vector("backbone.norm_f.weight"),
            head=self._matrix("lm_head.weight"),
            count=len(layers),
            hidden=config.hidden_size,
            eps=config.layer_norm_epsilon,
        )
        self._weights = {}  # the packed ones take their place

    def step(self, ids: Tensor, rows: Tensor, cache: Cache) -> Tensor:
        """See Decoder.step."""
        return self._run(ids, rows, cache.lengths[rows], torch.ones(len(ids), dtype=torch.uint8), cache)

    def prefill(self, news: Sequence[Sequence[int]], rows: Sequence[int], cache: Cache) -> None:
        """See Decoder.prefill."""
        ids = torch.tensor(list(chain.from_iterable(news)))
        at = torch.tensor(rows).repeat_interleave(torch.tensor([len(new) for new in news]))
        lengths = torch.cat([torch.arange(len(new)) for new in news]) + cache.lengths[at]
        for part in torch.arange(len(ids)).split(TOGETHER):
            self._run(ids[part], at[part], lengths[part], torch.zeros(len(part), dtype=torch.uint8), cache)

    def _run(self, ids: Tensor, rows: Tensor, lengths: Tensor, wanted: Tensor, cache: Cache) -> Tensor:
        """Tokens of conversations one after the other -> logits of those wanted."""
        last = self._config.vocab_size - 1
        if not 0 <= int(ids.min()) <= int(ids.max()) <= last:
            raise IndexError(f"ids from 0 to {last}; got {next(i for i in ids.tolist() if not 0 <= i <= last)}")
        if int(lengths.max()) >= cache.capacity:
            raise ValueError(
                f"attention cache holds {cache.capacity} tokens a row; {int(lengths.max()) + 1} are needed"
            )
        stride = self._model.head.tiles * TILE
        logits = native.floats(int(wanted.sum()), stride)
        tensors = [pointer(tensor) for tensor in (ids, rows, lengths, wanted, logits)]
        batch = native.Batch(*tensors, len(ids), stride)
        records = ctypes.byref(self._model), ctypes.byref(self._cache(cache)), ctypes.byref(batch)
        if self._library.decode(*records, torch.get_num_threads()):
            raise MemoryError(f"no memory for {len(ids)} tokens at once")
        cache.lengths.scatter_reduce_(0, rows, lengths + 1, "amax")
        return logits[:, : self._config.vocab_size]

    def _cache(self, cache: Cache) -> native.Cache:
        if self._past is None or self._past[0] is not cache:
            layers = (native.Past * self._model.count)()
            for index, (first, second) in cache.layers.items():
                layers[index] = native.Past(pointer(first), pointer(second))
            self._past = (cache, native.Cache(layers, cache.capacity))
        return self._past[1]

    # -- records

    def _layer(self, index: int, letter: str) -> native.Layer:
        name = f"backbone.layers.{index}"
        make = {"M": self._mamba, "*": self._attention, "E": self._moe, "-": self._mlp}[letter]
        mixer = make(f"{name}.mixer")
        self._kept.append(mixer)
        return native.Layer(ord(letter), self._vector(f"{name}.norm.weight"), ctypes.addressof(mixer))

    def _mamba(self, name: str) -> native.Mamba:
        config = self._config
        return native.Mamba(
            into=self._matrix(f"{name}.in_proj.weight"),
            out=self._matrix(f"{name}.out_proj.weight"),
            conv=self._keep(self._plain(f"{name}.conv1d.weight")[:, 0].T),
            conv_bias=self._vector(f"{name}.conv1d.bias"),
            dt_bias=self._vector(f"{name}.dt_bias"),
            a=self._keep(-torch.exp(self._plain(f"{name}.A_log"))),
            d=self._vector(f"{name}.D"),
            norm=self._vector(f"{name}.norm.weight"),
            heads=config.mamba_num_heads,
            dim=config.mamba_head_dim,
            state=config.ssm_state_size,
            groups=config.n_groups,
            kernel=config.conv_kernel,
            dt_min=config.time_step_min if config.hf_dt_clamp else 0.0,
        )

    def _attention(self, name: str) -> native.Attention:
        config = self._config
        qkv = torch.cat([self._plain(f"{name}.{part}_proj.weight") for part in "qkv"])
        return native.Attention(
            qkv=self._packed(qkv),
            out=self._matrix(f"{name}.o_proj.weight"),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=config.head_dim,
        )

    def _moe(self, name: str) -> native.MoE:
        config = self._config
        latent = config.moe_latent_size is not None
        experts = [self._mlp(f"{name}.experts.{index}") for index in range(config.n_routed_experts)]
        return native.MoE(
            gate=self._matrix(f"{name}.gate.weight"),
            into=self._matrix(f"{name}.fc1_latent_proj.weight") if latent else native.Matrix(),
            back=self._matrix(f"{name}.fc2_latent_proj.weight") if latent else native.Matrix(),
            experts=self._array(native.MLP, experts),
            shared=self._mlp(f"{name}.shared_experts"),
            bias=self._vector(f"{name}.gate.e_score_correction_bias"),
            count=config.n_routed_experts,
            top=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=int(config.norm_topk_prob),
            factor=config.routed_scaling_factor,
        )

    def _mlp(self, name: str) -> native.MLP:
        return native.MLP(self._matrix(f"{name}.up_proj.weight"), self._matrix(f"{name}.down_proj.weight"))

    # -- tensors

    def _matrix(self, name: str) -> native.Matrix:
        return self._packed(self._weights[name])

    def _packed(self, weight: Weight) -> native.Matrix:
        packed: Packed = pack(self._library, weight, self._arena)
        self._kept.append(packed)
        return packed.record

    def _plain(self, name: str) -> Tensor:
        weight = self._weights[name]
        if isinstance(weight, Tensor):
            return weight.detach().float()
        raise ValueError(f"{name} is quantised; the decode step wants it in float32")

    def _vector(self, name: str) -> int:
        return self._keep(self._plain(name))

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return pointer(tensor)

    def _array(self, record: type[Any], items: list[Any]) -> Any:
        array = (record * len(items))(*items)
        self._kept.append(array)
        return array
