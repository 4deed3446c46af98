"""The CPU kernels: a table of each part's figures: `python benchmarks/kernels.py [--json FILE]`. Of products, see
products.py; here is a whole model's step against transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import products
import torch
from turns import ROUNDS, built, main, microseconds, ratio, take_turns

from palaestra.kernels.native import Library
from palaestra.model.cache import Cache
from palaestra.model.checkpoint import save
from palaestra.model.decoder import decoder
from palaestra.model.network import Hybrid
from palaestra.model.presets import preset

CONVERSATIONS = (1, 16)
STEPS, PROMPT = 20, 16


def foreign(model: Hybrid) -> Any:
    """The same weights in transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        theirs = transformers.NemotronHForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    return theirs.eval()


@torch.no_grad()
def whole_model(native: Library) -> dict[str, Any]:
    """A decode step of the preset `mini` from NVFP4 weights, against transformers on the same values, and the largest
    difference of logits from the plain network's, relative to the largest logit."""
    torch.manual_seed(0)
    model = Hybrid(preset("mini")).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "conv1d" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    weights = dict(model.weights())
    model.load_weights(weights.items())
    ours, theirs = decoder(model.config, weights, native), foreign(model)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "kernels": ours.kernels}
    for count in CONVERSATIONS:
        ids, rows = torch.randint(2048, (count, PROMPT + 1)), torch.arange(count)
        plain = model(ids)[:, -1]
        cache = Cache.empty(model.config, count, PROMPT + 1 + (STEPS + 1) * (ROUNDS + 1))
        ours.prefill(ids[:, :-1].tolist(), rows.tolist(), cache)
        logits = ours.step(ids[:, -1].contiguous(), rows, cache)
        state = theirs(ids, use_cache=True).past_key_values
        last = ids[:, -1].contiguous()
        seconds = take_turns(
            {
                "ours": lambda last=last, rows=rows, cache=cache: ours.step(last, rows, cache),
                "transformers": lambda last=last, state=state: theirs(last[:, None], past_key_values=state),
            },
            STEPS,
        )
        found[f"{count} conversations"] = {
            **{f"{name}, us": microseconds(rounds) for name, rounds in seconds.items()},
            "times transformers": ratio(seconds["transformers"], seconds["ours"]),
            "logits' difference": float((logits - plain).abs().max() / plain.abs().max()),
        }
    return found


def measure() -> dict[str, Any]:
    """All of it, with one thread and with all."""
    native = built()
    most, found = torch.get_num_threads(), {"tier": native.tier, "products": products.rows(native)}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        found[f"whole model, threads: {threads}"] = whole_model(native)
    torch.set_num_threads(most)
    return found


if __name__ == "__main__":
    main(__doc__, measure)
