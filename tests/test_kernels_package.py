"""The kernels as they are installed: a light import, a wheel with the library in it, and one that was built without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("gym", "environments", "tasks", "kernels", "model", "rollout", "trainer")
PATH = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
NO_CUDA = {"PATH": os.pathsep.join(PATH), "CUDA_HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
NO_COMPILER = {"CC": "/nonexistent", "PATH": "/nonexistent"}
USE = """
import torch
from palaestra.kernels import native
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.decoder import decoder
from palaestra.model.network import Hybrid

torch.manual_seed(0)
config = ModelConfig(vocab_size=64, hidden_size=32, head_dim=16, mamba_head_dim=16, ssm_state_size=16,
                     hybrid_override_pattern="ME*-", intermediate_size=64, moe_intermediate_size=32,
                     moe_shared_expert_intermediate_size=32, moe_latent_size=16)
model = Hybrid(config).eval()
weights = dict(model.weights())
model.load_weights(weights.items())
ids, cache = torch.tensor([3, 1, 4]), Cache.empty(config, 3, 4)
with torch.no_grad():
    plain = model(ids[:, None], None, Cache.empty(config, 3, 4))[:, 0]
for _ in range(2):
    step = decoder(config, weights, native.library())
found = step.step(ids, torch.arange(3), cache)
print(native.FILE, step.kernels, torch.equal(found, plain), torch.allclose(found, plain, rtol=1e-4, atol=1e-4))
"""


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process prints, every warning included."""
    command = [sys.executable, "-P", "-W", "always", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, **environment})


def pip(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout + done.stderr


def built(folder: Path, **environment: str) -> tuple[Path, Path]:
    """A wheel that is built from a copy of the sources, in that environment, and where it is then installed."""
    source, site = folder / "source", folder / "site"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", folder, **environment)
    (wheel,) = folder.glob("*.whl")
    pip("install", wheel, "--target", site)
    return wheel, site


def test_an_import_compiles_nothing_and_starts_no_process():
    code = (
        "import sys, torch\n"
        "started = []\n"
        "sys.addaudithook(lambda event, args: started.append(event)\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork') else None)\n"
        "import palaestra.kernels\n"
        "from palaestra.kernels import fp8, hadamard, layouts, linear, native, nvfp4\n"
        "print(started, native.library() is not None)\n"
    )
    done = in_python(code, **NO_COMPILER)
    assert (done.stdout, done.stderr) == ("[] True\n", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_cuda_a_wheel_fits_every_python_of_its_platform_and_holds_the_library(tmp_path):
    wheel, site = built(tmp_path, **NO_CUDA)
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform not in ("", "any")
    assert "palaestra/kernels/_cpu.so" in zipfile.ZipFile(wheel).namelist()
    done = in_python(USE, PYTHONPATH=str(site), **NO_COMPILER)
    file, kernels, _, close = done.stdout.split()
    assert Path(file).is_relative_to(site), done.stderr
    assert kernels in ("avx512bf16", "avx512", "avx2", "portable")
    assert close == "True"
    assert "palaestra was installed without a C compiler" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_compiler_the_wheel_is_built_all_the_same_and_runs_in_torch_after_one_warning(tmp_path):
    wheel, site = built(tmp_path, **NO_COMPILER)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    done = in_python(USE, PYTHONPATH=str(site), **NO_COMPILER)
    file, kernels, equal, _ = done.stdout.split()
    assert Path(file).is_relative_to(site), done.stderr
    assert (kernels, equal) == ("torch", "True")
    assert done.stderr.count("Warning") == done.stderr.count("palaestra was installed without a C compiler") == 1
