"""The CPU kernels against PyTorch, transformers and the memory: `python benchmarks/kernels.py [--json FILE]`.

Candidates take turns in every round; a figure is the median of the rounds. Weights rotate over more memory than the
cache holds, so that they come from memory, as in a large model.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from palaestra.kernels import nvfp4
from palaestra.kernels.linear import Packed, pack
from palaestra.kernels.native import TILE, Library, library
from palaestra.model.cache import Cache
from palaestra.model.checkpoint import save
from palaestra.model.decoder import decoder
from palaestra.model.network import Hybrid
from palaestra.model.presets import preset

ROUNDS = 7
FROM_MEMORY = 256 << 20
"""Bytes that are read before one is read again."""
SHAPES = ((2688, 1024), (4096, 4096))
BATCHES = (1, 8)
CONVERSATIONS = (1, 16)
STEPS, PROMPT = 20, 16


def take_turns(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds a call, by candidate, one figure a round."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            found[name].append((time.perf_counter() - started) / repeats)
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of how many times faster."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


def bandwidth() -> float:
    """GB/s at which torch's number of threads sums float32 from memory, the best of the rounds."""
    values = torch.ones(FROM_MEMORY // 4)
    return values.nbytes / min(take_turns({"sum": values.sum}, 1)["sum"]) / 1e9


def rotating(items: list[Any]) -> Callable[[], Any]:
    """The next item of a ring."""
    ring = itertools.cycle(items)
    return lambda: next(ring)


def product(native: Library, weights: list[Packed], x: torch.Tensor, int8: bool) -> Callable[[], None]:
    """A product with the next of the weights."""
    following, y = rotating(weights), torch.empty(len(x), weights[0].record.tiles * TILE)
    multiply = native.multiply_int8 if int8 else native.multiply
    threads = torch.get_num_threads()

    def call() -> None:
        multiply(ctypes.byref(following().record), x.data_ptr(), len(x), y.data_ptr(), threads)

    return call


def plain_product(weights: list[torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same in torch, in the weights' dtype."""
    following, x = rotating(weights), x.to(weights[0].dtype)
    return lambda: torch.nn.functional.linear(x, following())


def products(native: Library) -> list[dict[str, Any]]:
    """Products with weights from memory, a row a shape and batch."""
    found = []
    memory = bandwidth()
    for rows, columns in SHAPES:
        plain = torch.randn(rows, columns, dtype=torch.bfloat16)
        packed = pack(native, nvfp4.quantize(plain.float()))
        ours = [pack(native, nvfp4.quantize(plain.float())) for _ in range(FROM_MEMORY // packed.nbytes)]
        theirs = [plain.clone() for _ in range(FROM_MEMORY // plain.nbytes)]
        for batch in BATCHES:
            x = torch.randn(batch, columns)
            seconds = take_turns(
                {
                    "NVFP4, float32 activations": product(native, ours, x, int8=False),
                    "NVFP4, int8 activations": product(native, ours, x, int8=True),
                    "torch, bf16": plain_product(theirs, x),
                },
                max(3, int(2e7 / (rows * columns * batch))),
            )
            row: dict[str, Any] = {"shape": f"{rows}x{columns}", "batch": batch}
            for name, rounds in seconds.items():
                row[f"{name}, us"] = round(1e6 * statistics.median(rounds), 1)
            for name in ("float32", "int8"):
                rounds = seconds[f"NVFP4, {name} activations"]
                row[f"{name}: times torch"] = ratio(seconds["torch, bf16"], rounds)
                row[f"{name}: share of the bandwidth"] = round(
                    packed.nbytes / statistics.median(rounds) / memory / 1e9, 2
                )
            found.append(row)
    return [{"bandwidth, GB/s": round(memory, 1), "threads": torch.get_num_threads()}, *found]


def foreign(model: Hybrid) -> Any:
    """The same weights in transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "model", model)
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
        plain = model.logits(model(ids)[:, -1])
        cache = Cache.empty(model.config, count, PROMPT + 1 + STEPS * (ROUNDS + 2))
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
            **{f"{name}, us": round(1e6 * statistics.median(rounds), 1) for name, rounds in seconds.items()},
            "times transformers": ratio(seconds["transformers"], seconds["ours"]),
            "logits' difference": float((logits - plain).abs().max() / plain.abs().max()),
        }
    return found


def measure() -> dict[str, Any]:
    """All of it, with one thread and with all."""
    native = library()
    if native is None:
        raise SystemExit("the kernels were not built: there was no C compiler")
    most, found = torch.get_num_threads(), {"tier": native.tier}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        found[f"threads: {threads}"] = {"products": products(native), "whole model": whole_model(native)}
    torch.set_num_threads(most)
    return found


def main() -> None:
    """Measure, print, and write the JSON file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    text = json.dumps(measure(), indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
