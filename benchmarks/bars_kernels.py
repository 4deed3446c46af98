"""The acceptance bars of the kernels: `make bars GROUP=kernels`."""

from __future__ import annotations

from typing import Any

import exactness
import experts
import mamba
import products
import torch
from bars import Measured, bar
from turns import built

import kernels

SHARES = {1: 0.80, 2: 0.65}
"""Of the bandwidth, by threads."""
AT_LEAST = {"times torch": 5.0, "times ggml, Q4_K": 1.15, "times ggml, NVFP4": 2.5}


def products_near_memory() -> Measured:
    """The ratios to ggml and torch with one thread at one row; two threads are held to the bandwidth and to torch. A
    figure that the upper quartile of the rounds reaches is reached."""
    rows = products.rows(built())
    failed = []
    for row in rows:
        alone, single = row["threads"] == 1, row["batch"] == 1
        wanted = {"times torch": 0.95}
        if row["from"] == "cache":
            wanted |= {"times ggml's fastest": 2.0} if alone and single else {}
        elif single:
            wanted |= {"share of it": SHARES[row["threads"]], **(AT_LEAST if alone else {})}
        elif row["batch"] == 8:
            wanted |= {"times torch": 1.8}
        name = f"{row['shape']}, batch {row['batch']}, threads {row['threads']}"
        spread = row[products.UPPER]
        failed += [
            f"{name}: {what} {row[what]} (upper quartile {spread[what]}), not {least}"
            for what, least in wanted.items()
            if spread[what] < least
        ]
    return Measured(not failed, {"failed": failed, "rows": rows})


def grouped_experts() -> Measured:
    """With one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = experts.rows(built())
    torch.set_num_threads(threads)
    return Measured(all(row["times torch"] >= (3 if row["tokens"] <= 8 else 0.95) for row in rows), {"rows": rows})


TIMES = {1: 20.0, 16: 10.0}
DIFFERENCE = 1e-2


def whole_model() -> Measured:
    """With all threads; by the median of the rounds."""
    found = kernels.whole_model(built())
    shown = [found[f"{count} conversations"] for count in TIMES]
    fast = all(row["times transformers"] >= least for row, least in zip(shown, TIMES.values(), strict=True))
    return Measured(fast and all(row["logits' difference"] < DIFFERENCE for row in shown), found)


SCAN_TIMES = {"forward": 2.0, "with backward": 1.8}
STEP_TIMES = {1: 10.0, 32: 7.0}
SHARE, ROOFLINE_SHARE = 0.7, 0.8


def mamba_kernels() -> Measured:
    """With one thread and with all; by the median of the rounds, for a step by their upper quartile. A step cannot be
    faster than its states are read and written; where that leaves less than what is wanted, 80 % of it are wanted."""
    built()
    rows = mamba.measure()
    scans, steps, peaks = (
        [row for row in rows if kind in row] for kind in ("scan", "step of conversations", "peak MB of")
    )
    fast = all(row["times transformers"] >= SCAN_TIMES[row["scan"]] for row in scans)
    lean = all(row["ours"] <= row["transformers"] for row in peaks)
    quick = all(row["times plain, in place, upper quartile"] >= _wanted(row) for row in steps)
    full = all(row["share of the bandwidth"] >= SHARE for row in steps if row["step of conversations"] > 1)
    return Measured(fast and lean and quick and full, {"rows": rows})


def _wanted(row: dict[str, Any]) -> float:
    """How many times faster a step must be."""
    wanted, roofline = STEP_TIMES[row["step of conversations"]], row["roofline: times plain, in place"]
    return wanted if roofline >= wanted else ROOFLINE_SHARE * roofline


BARS = (
    bar(1, "NVFP4 bit for bit on 10,000 tensors and as others make it; every kernel within rounding of float64")(
        exactness.exact
    ),
    bar(2, "stochastic rounding within 4 standard errors between all neighbouring codes", quick=True)(
        exactness.unbiased
    ),
    bar(
        3,
        "NVFP4 products: .80 (two threads .65) of the bandwidth, 5 times torch, 1.15 and 2.5 times ggml; reached by "
        "the upper quartile of the rounds",
    )(products_near_memory),
    bar(4, "grouped experts: 3 times a loop of torch's bf16 linears up to 8 tokens, .95 times up to 64")(
        grouped_experts
    ),
    bar(
        5,
        "Mamba-2: scan 2 times transformers, 1.8 with backward, in no more memory; a step 10 times plain PyTorch at "
        "one conversation, 7 times at 32 (80 % of what the memory allows, where that is less than 7), reached by the "
        "upper quartile of the rounds, at 70 % of the bandwidth",
    )(mamba_kernels),
    bar(6, "a whole model's step: 20 times transformers at one conversation, 10 times at 16, logits within 1e-2")(
        whole_model
    ),
    bar(8, "imported in 0.3 s beyond torch; the wheel builds without CUDA, and without a compiler runs in PyTorch")(
        exactness.package
    ),
)
