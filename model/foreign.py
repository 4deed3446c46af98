"""Causal language models of other makes, through transformers: the same network seen by engine and learner."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from palaestra.gym.registry import UsageError
from palaestra.model.checkpoint import replace

TOLERANCE = 1e-3


class Foreign(nn.Module):
    """Any causal language model that transformers loads, in float32 and unquantised, with its tokenizer.

    Shaped like `model.network.Hybrid`: hidden states first, logits of those that are asked for.
    """

    def __init__(self, inner: Any, tokenizer: Any) -> None:
        super().__init__()
        self.inner = inner
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: str) -> Foreign:
        """The model of a local Hugging Face folder. Raises UsageError naming what is missing or cannot be used."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise UsageError("transformers:PATH needs transformers: pip install 'palaestra[hf]'") from None
        logging.disable_progress_bar()
        folder = Path(path)
        if not (folder / "config.json").is_file():
            hint = "; `palaestra model fetch smollm2` writes one to models/smollm2"
            raise UsageError(f"transformers:{path}: there is no model folder (no config.json in it){hint}")
        try:
            inner = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            text = str(error).strip().splitlines()[0]
            raise UsageError(f"transformers:{path} cannot be loaded: {text}; fetch or write the folder anew") from None
        model = cls(inner.eval(), tokenizer)
        model._check_head(path)
        return model

    def hidden(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states float32[B, L, hidden] of right-padded ids int64[B, L]; lengths int64[B]."""
        seen = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        result: Tensor = self.inner.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[..., hidden] -> float32[..., vocabulary]."""
        result: Tensor = self.inner.get_output_embeddings()(hidden).float()
        return result

    def quantised(self) -> AbstractContextManager[None]:
        """Nothing is quantised."""
        return nullcontext()

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the parameters and buffers under their names in the network; tied ones once."""
        for name, tensor in self._distinct():
            yield name, tensor.clone()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights as `weights()` gives them. Raises KeyError naming one that is not known."""
        own = dict(self._distinct())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder, weights and tokenizer, whole or not at all. Raises OSError naming the folder."""
        staged = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(staged, ignore_errors=True)
        try:
            self.inner.save_pretrained(staged)
            self.tokenizer.save_pretrained(staged)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise OSError(f"cannot write model {folder}: {error}; free space there or choose another folder") from error
        replace(folder, staged)

    def _distinct(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in self.inner.named_parameters())
        yield from ((name, buffer) for name, buffer in self.inner.named_buffers() if buffer is not None)

    @torch.no_grad()
    def _check_head(self, path: str) -> None:
        """Refuse a network that does more to its hidden states than its output matrix (a soft cap on logits, say)."""
        ids = torch.arange(8)[None] + 3
        whole = self.inner(input_ids=ids).logits.float()
        ours = self.logits(self.hidden(ids, torch.tensor([8])))
        if not torch.allclose(whole, ours, atol=TOLERANCE, rtol=TOLERANCE):
            raise UsageError(f"transformers:{path}: its logits are more than its output matrix; it cannot be used here")
