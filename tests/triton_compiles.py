"""Compiles the Triton kernels for architectures that are not at hand, by Triton's own assembler, at the shapes of large
models. `test_kernels_triton.py` runs this file in a process of its own, without the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from palaestra.kernels import nvfp4
from palaestra.kernels.attention import Pages
from palaestra.kernels.experts import Routing
from palaestra.kernels.mamba import Mixer, Slots
from palaestra.kernels.triton import blackwell
from palaestra.kernels.triton.attention import attend
from palaestra.kernels.triton.experts import experts, route
from palaestra.kernels.triton.linear import linear
from palaestra.kernels.triton.mamba import step
from palaestra.kernels.triton.quantize import Hadamard, quantize, transform
from palaestra.kernels.triton.scan import scan

SHARED = {90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program may have, by architecture (CUDA's programming guide, compute capabilities)."""
DTYPES = [torch.bfloat16, torch.float32]
HEADS, DIM, STATE, GROUPS, KERNEL = 64, 64, 128, 8, 4


class Absent:
    """A driver for a device that is not there."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def assembly(monkeypatch):
    """PTX by the kernel's name. Launches compile, write nothing, and fail if the device's shared memory is too small;
    memory that they would have written is 0."""
    found: dict[str, str] = {}

    def launch(kernel, grid):
        def compiles(*arguments, **options):
            made = kernel.warmup(*arguments, grid=grid, **options)
            assert made.metadata.shared <= SHARED[made.metadata.target.arch], kernel.__name__
            found[kernel.__name__] = made.asm["ptx"]

        return compiles

    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    return found


@pytest.fixture(params=SHARED)
def architecture(request, monkeypatch):
    monkeypatch.setattr(driver, "_active", Absent(request.param))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64])
def test_products(rows, dtype, architecture, assembly):
    linear(torch.ones(rows, 1024, dtype=dtype), nvfp4.quantize(torch.ones(2688, 1024)))
    dots = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    assert (dots[architecture] in assembly["_linear"]) == (rows > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts(tokens, dtype, architecture, assembly):
    up, down = nvfp4.quantize(torch.ones(2, 2688, 1024)), nvfp4.quantize(torch.ones(2, 1024, 2688))
    chosen = torch.zeros(tokens, 1, dtype=torch.int64)
    experts(torch.ones(tokens, 1024, dtype=dtype), up, down, chosen, torch.ones(tokens, 1))
    route(torch.ones(3, 512), torch.ones(512), Routing(22, groups=8, top_groups=4))
    assert set(assembly) == {"_products", "_route"}


def test_quantisation(architecture, assembly):
    weight = torch.ones(16, 256, dtype=torch.bfloat16)
    quantize(weight, square=True)
    quantize(weight.float(), seed=3, rotation=Hadamard(128))
    transform(weight, Hadamard(16))
    assert set(assembly) == {"_largest", "_encode", "_transform"}


@pytest.mark.parametrize(("kept", "seed"), [(torch.float32, None), (torch.float16, 3)])
def test_decode_steps(kept, seed, architecture, assembly):
    channels = HEADS * DIM + 2 * GROUPS * STATE
    sizes = (channels, HEADS, HEADS, HEADS, HEADS * DIM)
    mixer = Mixer(torch.ones(KERNEL, channels), *(torch.ones(size) for size in sizes), GROUPS)
    pool = Slots(torch.ones(3, KERNEL - 1, channels), torch.ones(3, HEADS, DIM, STATE, dtype=kept))
    projected = torch.ones(2, HEADS * DIM + channels + HEADS, dtype=torch.bfloat16)
    step(projected, mixer, pool, torch.arange(2), seed)
    assert set(assembly) == {"_recur", "_norm"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scan_and_its_gradients(dtype, architecture, assembly):
    x, b, c = (torch.ones(100, *shape, dtype=dtype) for shape in ((HEADS, DIM), (GROUPS, STATE), (GROUPS, STATE)))
    inputs = (x, torch.ones(100, HEADS), -torch.ones(HEADS), b, c, torch.ones(1, HEADS, DIM, STATE))
    y, _ = scan(*(part.requires_grad_() for part in inputs), torch.tensor([0, 100]))
    y.sum().backward()
    assert set(assembly) == {"_added", "_pass", "_output", "_gradients"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_a_paged_cache(dtype, architecture, assembly):
    table, lengths = torch.zeros(2, 300, dtype=torch.int32), torch.ones(2, dtype=torch.int64)
    for kept in (dtype, torch.float8_e4m3fn):
        cache = torch.ones(9, 2, 16, 128).to(kept)
        attend(torch.ones(2, 32, 128, dtype=dtype), Pages(cache, cache, table), lengths)
    assert set(assembly) == {"_attend", "_reduce"}


def test_products_of_two_nvfp4_matrices_are_the_hardwares_own(monkeypatch, assembly):
    monkeypatch.setattr(driver, "_active", Absent(100))
    weight = nvfp4.quantize(torch.ones(128, 256))
    monkeypatch.setattr(blackwell, "supported", lambda device: True)
    blackwell.linear(weight, weight)
    assert "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale" in assembly["_product"]
