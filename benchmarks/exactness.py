"""Bars 1, 2 and 8 of group kernels: right to the bit or to rounding, unbiased, and installed anywhere.

The measurements are tests, slow ones included; what they record is what is reported.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from bars import ROOT, Measured
from cases import measured

EXACT = {
    "quantised as by rational numbers": "_exact.py::test_quantisation_is_the_formats_definition_bit_for_bit",
    "dequantised as by rational numbers": "_exact.py::test_every_code_under_every_scale_is_its_exact_product",
    "refused": "_exact.py::test_what_nvfp4_cannot_hold_is_refused",
    "quantised as by others": "_exact.py::test_others_make_the_same_codes_and_scales_at_the_same_global_scale",
    "dequantised as by others": "_exact.py::test_both_layouts_are_dequantised_as_by_their_makers",
    "written as by others": "_exact.py::test_both_layouts_are_written_as_by_their_makers",
    "written and read": ".py::test_both_layouts_give_back_every_bit_of_ours",
    "products": "_native.py::test_products_are_those_of_float64_and_of_every_tier",
    "products among NaN": "_native.py::test_every_output_is_written_and_nothing_around_it_is_read_or_written",
    "NaN in one row": "_native.py::test_what_is_no_number_stays_in_its_row",
    "every value of every format": "_native.py::test_every_value_of_a_format_is_met_exactly",
    "decode steps among NaN": "_native.py::test_a_decode_step_is_that_of_float64_whatever_lay_in_its_memory",
    "draws": "_native.py::test_draws_are_those_of_float64_in_every_tier",
}
UNBIASED = {"between neighbouring codes": ".py::test_stochastic_rounding_is_unbiased_between_a_code_and_the_next"}
PACKAGE = {
    "import": "_package.py::test_an_import_compiles_nothing_and_starts_no_process",
    "wheel": "_package.py::test_without_cuda_a_wheel_fits_every_python_of_its_platform_and_holds_the_library",
    "wheel without a compiler": "_package.py::test_without_a_compiler_the_wheel_is_built_all_the_same_"
    "and_runs_in_torch_after_one_warning",
}
IMPORT = """
import time, torch
started = time.perf_counter()
import palaestra.kernels
from palaestra.kernels import linear, native, nvfp4
print(time.perf_counter() - started)
"""
IMPORTS, SECONDS = 9, 0.3


def exact() -> Measured:
    """Formats bit for bit, kernels within rounding."""
    return measured(_placed(EXACT))


def unbiased() -> Measured:
    """Stochastic rounding within four standard errors."""
    return measured(_placed(UNBIASED))


def package() -> Measured:
    """The import's seconds beyond torch's, and the wheels."""
    seconds = statistics.median(_import_seconds() for _ in range(IMPORTS))
    met, figures = measured(_placed(PACKAGE))
    return Measured(met and seconds < SECONDS, {"import, seconds": round(seconds, 4), **figures})


def _import_seconds() -> float:
    command = [sys.executable, "-P", "-c", IMPORT]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def _placed(tests: dict[str, str]) -> dict[str, str]:
    return {part: f"tests/test_kernels{test}" for part, test in tests.items()}
