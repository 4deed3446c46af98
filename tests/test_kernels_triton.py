"""Runs the tests of the Triton kernels: on a CUDA device where there is one, else in Triton's interpreter; and compiles
them for architectures that are not at hand. Each in a process of its own: triton reads whether it interprets when it is
first imported, and torch may have imported it before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palaestra.kernels.triton import available

pytest.importorskip("triton")
HERE = Path(__file__).parent
VARIABLE = "TRITON_INTERPRET"
SECONDS = 600


def run(file: str, cache: Path, **variables: str) -> None:
    """The tests of a file pass. What triton compiles goes to `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file],
        env={**environment, "TRITON_CACHE_DIR": str(cache), **variables},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(SECONDS)
def test_the_kernels_agree_with_pytorch(tmp_path):
    run("triton_cases.py", tmp_path, **({} if torch.cuda.is_available() else {VARIABLE: "1"}))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_the_kernels_compile_for_devices_that_are_not_here(tmp_path):
    run("triton_compiles.py", tmp_path)


def test_they_are_available_with_a_device_or_the_interpreter_alone(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert available() == torch.cuda.is_available()
    monkeypatch.setenv(VARIABLE, "1")
    assert available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_device():
    command = [sys.executable, HERE.parent / "benchmarks" / "kernels_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, "no CUDA device" in done.stderr) == (1, "", True)
