"""Recipes of quantisation: which weights of a checkpoint become NVFP4 or FP8, and by how much they are then off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palaestra.kernels import fp8, nvfp4
from palaestra.kernels.linear import Weight
from palaestra.kernels.nvfp4 import BLOCK, Recipe
from palaestra.model import stored
from palaestra.model.checkpoint import CONFIG, opened, tokenizer_hash, write_folder
from palaestra.model.config import ModelConfig, module_of
from palaestra.model.layers import stays_float32
from palaestra.model.network import Hybrid
from palaestra.model.shards import Named

NVFP4, FP8, KEPT = "nvfp4", "fp8", "bf16"
ALGORITHMS = {NVFP4: "W4A16_NVFP4", FP8: "FP8"}
"""ModelOpt's names of them."""
PRODUCER = {"name": "palaestra"}
LEAST_ERROR = Recipe("error")
MAMBA = ("in_proj", "out_proj")
IN_FP8 = (*MAMBA, "o_proj", "fc1_latent_proj", "fc2_latent_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

Chooser = Callable[[str, ModelConfig], str]
"""The format of the module of that name (an expert's without its number)."""


def rl(module: str, config: ModelConfig) -> str:
    """What the trainer publishes: `ModelConfig.nvfp4`."""
    return NVFP4 if config.quantises(module) else KEPT


def nano(module: str, config: ModelConfig) -> str:
    """As Nemotron 3 Nano was published: NVFP4 everywhere but in attention and in the Mamba layer before each."""
    layer, part = _place(module)
    if part in ATTENTION or (part in MAMBA and config.hybrid_override_pattern[layer + 1 : layer + 2] == "*"):
        return KEPT
    return NVFP4 if part in ("up_proj", "down_proj", *MAMBA) else KEPT


def super_(module: str, config: ModelConfig) -> str:
    """As Nemotron 3 Super was: routed experts in NVFP4; shared experts and the projections of Mamba, of the latent
    space and out of attention in FP8."""
    _, part = _place(module)
    if ".experts." in module:
        return NVFP4
    return FP8 if ".shared_experts." in module or part in IN_FP8 else KEPT


RECIPES: dict[str, Chooser] = {"rl": rl, "nano": nano, "super": super_}


def _place(module: str) -> tuple[int, str]:
    """The layer's number and the projection's name."""
    parts = module.split(".")
    return int(parts[2]), parts[-1]


@dataclass(frozen=True)
class Row:
    """One kind of weight in one layer: bytes before (in bf16) and after, and the error relative to the norm."""

    module: str
    format: str
    weights: int
    before: int
    after: int
    error: float


class Report:
    """Adds up the weights of each module."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))

    def add(self, name: str, form: str, weight: Tensor, kept: Weight) -> None:
        """One weight, and what is kept of it."""
        off = (stored.values(kept).float() - weight.float()).norm().double() ** 2
        after = sum(tensor.nbytes for tensor in stored.tensors_of(name, kept).values())
        found = [1, 2 * weight.numel(), after, float(off), float(weight.float().norm().double() ** 2)]
        self._sums[module_of(name), form] += torch.tensor(found, dtype=torch.float64)

    def rows(self) -> list[Row]:
        """In the order in which they came."""
        found = []
        for (module, form), sums in self._sums.items():
            count, before, after, off, norm = sums.tolist()
            found.append(Row(module, form, int(count), int(before), int(after), (off / norm) ** 0.5 if norm else 0.0))
        return found


def quantize(folder: Path, output: Path, recipe: str) -> list[Row]:
    """Write a checkpoint anew, quantised, weight after weight; the global scales are powers of two, the block scales of
    least squared error, and all else is in bf16, the router and vectors in float32.

    Raises KeyError for an unknown recipe, CheckpointError, OSError, and ValueError naming a weight that cannot be held.
    """
    report = Report()
    with opened(folder) as (config, kept):
        formats = chosen(config, RECIPES[recipe])

        def tensors() -> Iterator[Named]:
            for name, weight in kept:
                values = stored.values(weight)
                found = _quantised(name, values, formats[name])
                if formats[name] != KEPT:
                    report.add(name, formats[name], values, found)
                yield from stored.tensors_of(name, found).items()

        write_folder(output, _documents(config, formats), tensors(), tokenizer_hash(folder))
    return report.rows()


def chosen(config: ModelConfig, choose: Chooser) -> dict[str, str]:
    """The format of every weight: matrices of the trunk's layers as the recipe says, all else as it is."""
    with torch.device("meta"):
        weights = Hybrid(config).state_dict()
    matrices = {
        name
        for name, tensor in weights.items()
        if tensor.dim() == 2 and name.startswith("backbone.layers.") and not stays_float32(name, tensor)
    }
    return {name: choose(module_of(name), config) if name in matrices else KEPT for name in weights}


def _quantised(name: str, weight: Tensor, form: str) -> Weight:
    try:
        if form == NVFP4:
            return nvfp4.quantize(weight, LEAST_ERROR)
        if form == FP8:
            return fp8.quantize(weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return weight.float() if stays_float32(name, weight) else weight.bfloat16()


def _documents(config: ModelConfig, formats: dict[str, str]) -> dict[str, Any]:
    """config.json and hf_quant_config.json, which say what is how, as ModelOpt's do."""
    modules = {module_of(name): form for name, form in sorted(formats.items())}
    quantised = {module: ALGORITHMS[form] for module, form in modules.items() if form != KEPT}
    used = set(quantised.values())
    quantization: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION" if len(used) > 1 else next(iter(used), None),
        "kv_cache_quant_algo": None,
        "group_size": BLOCK,
        "exclude_modules": [module for module, form in modules.items() if form == KEPT],
    }
    if len(used) > 1:
        quantization["quantized_layers"] = {module: {"quant_algo": name} for module, name in quantised.items()}
    made = {
        "torch_dtype": "bfloat16",
        "nvfp4": [module for module, form in modules.items() if form == NVFP4],
        "quantization_config": {"quant_method": "modelopt", "producer": PRODUCER, **quantization},
    }
    return {
        CONFIG: {**config.to_hf(), **made},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": quantization},
    }
