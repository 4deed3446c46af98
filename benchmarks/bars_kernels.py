"""The acceptance bars of the kernels: `make bars GROUP=kernels`."""

from __future__ import annotations

import exactness
from bars import Measured, bar

import kernels
from palaestra.kernels.native import library

TIMES = {1: 20.0, 16: 10.0}
DIFFERENCE = 1e-2


def whole_model() -> Measured:
    """With all threads; by the median of the rounds."""
    native = library()
    if native is None:
        return Measured(False, {"error": "the kernels were not built"})
    found = kernels.whole_model(native)
    shown = [found[f"{count} conversations"] for count in TIMES]
    fast = all(row["times transformers"] >= least for row, least in zip(shown, TIMES.values(), strict=True))
    return Measured(fast and all(row["logits' difference"] < DIFFERENCE for row in shown), found)


BARS = (
    bar(1, "NVFP4 bit for bit on 10,000 tensors and as others make it; every kernel within rounding of float64")(
        exactness.exact
    ),
    bar(2, "stochastic rounding within 4 standard errors between all neighbouring codes", quick=True)(
        exactness.unbiased
    ),
    bar(6, "a whole model's step: 20 times transformers at one conversation, 10 times at 16, logits within 1e-2")(
        whole_model
    ),
    bar(8, "imported in 0.3 s beyond torch; the wheel builds without CUDA, and without a compiler runs in PyTorch")(
        exactness.package
    ),
)
