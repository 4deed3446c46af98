"""Token policies by reference: `model:PATH` (ours) and `transformers:PATH`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from palaestra.gym.registry import UsageError
from palaestra.model.checkpoint import locate, read_config, tokenizer, weights
from palaestra.model.renderer import NemotronRenderer
from palaestra.model.shards import CheckpointError
from palaestra.rollout.hybrid_engine import HybridEngine
from palaestra.rollout.policy import TokenPolicy

SLOTS, CONTEXT = 32, 4096
WEIGHTS = (".safetensors", ".bin", ".gguf")


def model(path: str) -> TokenPolicy:
    """A checkpoint folder of ours, or one that ships, played on the NVFP4 values of its weights. Raises UsageError."""
    folder = locate(path)
    try:
        config, kept, known = read_config(folder), list(weights(folder)), tokenizer(folder)
    except CheckpointError as error:
        raise UsageError(f"policy model:{path}: {error}") from error
    return TokenPolicy(NemotronRenderer(known), HybridEngine(config, weights=kept), _digest(folder))


def transformers(path: str) -> TokenPolicy:
    """A causal language model in a Hugging Face folder, in float32. Raises UsageError."""
    from palaestra.model.foreign import Foreign
    from palaestra.model.template import TemplateRenderer
    from palaestra.rollout.transformers_engine import TransformersEngine

    network = Foreign.load(path)
    longest = getattr(network.inner.config, "max_position_embeddings", None) or CONTEXT
    engine = TransformersEngine(network, SLOTS, min(longest, CONTEXT))
    return TokenPolicy(TemplateRenderer(network.tokenizer), engine, _digest(Path(path)))


def _digest(folder: Path) -> str:
    """A hash of all weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
