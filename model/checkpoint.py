"""Checkpoint folders: config.json and safetensors files, in the layout of published Nemotron-H checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from palaestra.kernels.linear import Weight
from palaestra.kernels.nvfp4 import quantize
from palaestra.model import stored
from palaestra.model.config import ModelConfig, module_of
from palaestra.model.layers import stays_float32
from palaestra.model.network import Hybrid
from palaestra.model.shards import SHARD, WEIGHTS, CheckpointError, Named, Shards, write
from palaestra.model.tokenizer import Tokenizer

CONFIG = "config.json"
ASSETS = Path(str(files("palaestra.trainer").joinpath("assets")))
"""Where the checkpoints that ship lie."""


def save(
    model: Hybrid, folder: str | Path, tokenizer_hash: str = "", dtype: torch.dtype | None = None, shard: int = SHARD
) -> None:
    """Write a checkpoint folder, whole or not at all. Raises OSError naming the folder (a full disk, say).

    dtype: of matrices (None: as they are), the router's aside, which stay float32 like all vectors; shard: bytes of
    tensors in a file, beside which and the model no more than one tensor is held.
    """
    tensors = ((name, _stored(name, tensor, dtype)) for name, tensor in model.state_dict().items())
    config = {**model.config.to_hf(), "torch_dtype": _name(dtype or model.lm_head.weight.dtype)}
    write_folder(Path(folder), {CONFIG: config}, tensors, tokenizer_hash, shard)


def write_folder(
    folder: Path, documents: dict[str, Any], tensors: Iterable[Named], tokenizer_hash: str = "", shard: int = SHARD
) -> None:
    """Write JSON files, config.json among them, and tensors as they come, whole or not at all. Raises OSError naming
    the folder."""
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        write(staged, tensors, {"tokenizer_sha256": tokenizer_hash}, shard)
        documents = {**documents, CONFIG: {**documents[CONFIG], "tokenizer_sha256": tokenizer_hash}}
        for name, content in documents.items():
            (staged / name).write_text(json.dumps(content, indent=1) + "\n")
        _sync(staged)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {folder}: {error}; free space there or choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    replace(folder, staged)


def shipped() -> list[str]:
    """The names of the checkpoints that ship."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{WEIGHTS}"))


def locate(reference: str) -> Path:
    """The folder that `reference` names: a path, or the name of a checkpoint that ships (warmstart)."""
    folder = ASSETS / reference
    return folder if (folder / WEIGHTS).exists() else Path(reference)


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Hybrid:
    """Read a checkpoint folder: bf16, float32, and what is in NVFP4 or FP8, dequantised.

    `dtype` is that of matrices, as in `Hybrid.empty`. Beside the model no more than one tensor is held; the files are
    mapped. Raises CheckpointError naming file and tensor.
    """
    with opened(Path(folder)) as (config, kept):
        model = Hybrid.empty(config, dtype)
        room = model.state_dict()
        for name, weight in kept:
            room[name].copy_(stored.values(weight))
    return model


def weights(folder: Path) -> Iterator[Named]:
    """What a sampler needs, as `Hybrid.weights` gives it: weights that the folder keeps in NVFP4 or FP8 as they are,
    others quantised where its configuration says so. Raises CheckpointError naming file and tensor."""
    with opened(folder) as (config, kept):
        for name, weight in kept:
            if isinstance(weight, Tensor):
                weight = quantize(weight) if config.quantises(module_of(name)) else weight.float()
            yield from stored.tensors_of(name, weight).items()


@contextmanager
def opened(folder: Path) -> Iterator[tuple[ModelConfig, Iterator[tuple[str, Weight]]]]:
    """A folder's configuration, and its weights one after the other: all that the network has, of its shapes. Raises
    CheckpointError naming file and tensor."""
    config = read_config(folder)
    with Shards(folder) as shards:
        config = _with_what_is_there(folder, config, shards)
        with torch.device("meta"):
            wanted = {name: list(tensor.shape) for name, tensor in Hybrid(config).state_dict().items()}
        _compare(folder, shards, set(wanted))
        yield config, _fitting(shards, wanted)


def _fitting(shards: Shards, wanted: dict[str, list[int]]) -> Iterator[tuple[str, Weight]]:
    for name, shape in wanted.items():
        weight = stored.weight(shards, name)
        if stored.shape(weight) != shape:
            raise CheckpointError(
                f"{shards.path(name)}: {name} is {stored.shape(weight)}, where {CONFIG} asks for {shape}"
            )
        yield name, weight


def _with_what_is_there(folder: Path, config: ModelConfig, shards: Shards) -> ModelConfig:
    """transformers saves no prediction head, and leaves it in the configuration."""
    if not config.num_nextn_predict_layers or any(name.startswith("mtp.") for name in shards):
        return config
    warnings.warn(f"{folder} has lost its multi-token-prediction head; it is loaded without", stacklevel=3)
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def _compare(folder: Path, shards: Shards, wanted: set[str]) -> None:
    """Raises CheckpointError where the folder lacks a weight, or has one that the network does not know."""
    found = set(stored.names(shards))
    missing, strange = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]}{_more(missing)} is missing, which {CONFIG} asks for; fetch the folder anew"
        )
    if strange:
        raise CheckpointError(
            f"{folder}: {strange[0]}{_more(strange)} has no place in the network that {CONFIG} describes"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_config(folder: Path) -> ModelConfig:
    """The folder's config.json. Raises CheckpointError."""
    try:
        return ModelConfig.from_hf(folder / CONFIG)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise CheckpointError(f"{folder / CONFIG}: {what}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}; give the folder of a checkpoint") from error


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(torch.float32 if stays_float32(name, tensor) else dtype or tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tokenizer(folder: Path) -> Tokenizer:
    """The one that ships, with which the folder's model was trained. Raises CheckpointError where it was another."""
    found, trained_with = Tokenizer.load(), tokenizer_hash(folder)
    if trained_with not in ("", found.sha256):
        raise CheckpointError(
            f"{folder} was trained with another tokenizer ({trained_with[:12]}) than this package ships "
            f"({found.sha256[:12]})"
        )
    return found


def tokenizer_hash(folder: Path) -> str:
    """The hash of the tokenizer that the checkpoint was trained with; empty where none is recorded."""
    with Shards(folder) as shards:
        return shards.metadata.get("tokenizer_sha256", "")


def replace(folder: Path, staged: Path) -> None:
    """Put `staged` in the place of `folder`, whose old content stays at hand until the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
