"""Checkpoint folders: config.json and model.safetensors, in the layout of published Nemotron-H checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ASSETS = Path(str(files("palaestra.trainer").joinpath("assets")))
"""Where the checkpoints that ship lie."""


class CheckpointError(Exception):
    """A checkpoint cannot be used; the text names the file, what is wrong and what to do."""


def save(folder: Path, model: Hybrid, tokenizer_hash: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint folder, whole or not at all; `dtype` is that of matrices, the router's aside, which stay
    float32 like all vectors. Raises OSError naming the folder (a full disk, say)."""
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        tensors = {name: _stored(name, tensor, dtype) for name, tensor in model.state_dict().items()}
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt", "tokenizer_sha256": tokenizer_hash})
        config = {**model.config.to_hf(), "tokenizer_sha256": tokenizer_hash}
        (staged / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        _sync(staged)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {folder}: {error}; free space there or choose another folder"
        ) from error
    replace(folder, staged)


def shipped() -> list[str]:
    """The names of the checkpoints that ship."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{WEIGHTS}"))


def locate(reference: str) -> Path:
    """The folder that `reference` names: a path, or the name of a checkpoint that ships (warmstart)."""
    folder = ASSETS / reference
    return folder if (folder / WEIGHTS).exists() else Path(reference)


def load(folder: Path) -> Hybrid:
    """Read a checkpoint folder. Raises CheckpointError."""
    try:
        config = ModelConfig.from_hf(folder / CONFIG)
    except (OSError, ValueError, ValidationError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}; give the folder of a checkpoint") from error
    model = Hybrid(config)
    try:
        model.load_weights(load_file(folder / WEIGHTS).items())
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error}); write or fetch it anew") from error
    return model


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = tensor.dim() < 2 or ".gate." in name
    return tensor.to(torch.float32 if kept else dtype, copy=True).contiguous()


def tokenizer_hash(folder: Path) -> str:
    """The hash of the tokenizer that the checkpoint was trained with; empty where none is recorded."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        return str((file.metadata() or {}).get("tokenizer_sha256", ""))


def replace(folder: Path, staged: Path) -> None:
    """Put `staged` in the place of `folder`, whose old content stays at hand until the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
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
