"""What ModelOpt, compressed-tensors and torchao make of one weight, recorded for tests/test_kernels_exact.py.

    pip install nvidia-modelopt==0.47.0 compressed-tensors==0.20.1 torchao==0.18.0
    python -P benchmarks/record_nvfp4.py tests/fixtures/nvfp4.safetensors

The file holds `input` float32[20, 128] and, of each maker, the matrix in its layout (torchao's in ModelOpt's) under the
global scale that the maker itself would take (`own`) and under a power of two (`power`); and what the makers of the two
layouts dequantise theirs to. Its metadata name the versions.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

PACKAGES = ("nvidia-modelopt", "compressed-tensors", "torchao", "torch")
BLOCK = 16
SUBNORMAL = 4
"""So many rows come last whose block scales are subnormal, which torchao does not use."""


def weight() -> Tensor:
    """Rows of several sizes, of bf16 numbers, of eighths (many ties, zeros), of heavy tails, and tiny ones."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 128, generator=generator)
    rows[:6] *= torch.exp(torch.randn(6, 1, generator=generator))
    rows[6:9] = rows[6:9].bfloat16().float()
    rows[9:13] = (rows[9:13] * 8).round() / 8 + 0.0  # no negative zeros: ModelOpt drops their sign
    rows[9, :BLOCK] = 0
    rows[13:16] = rows[13:16] ** 3
    rows[-SUBNORMAL:] *= 2.0**-11
    return rows


def by_modelopt(rows: Tensor, scale2: Tensor | None) -> dict[str, Tensor]:
    """The parts that end in these names."""
    packed, scales, scale2 = NVFP4QTensor.quantize(rows, BLOCK, weights_scaling_factor_2=scale2)
    values = packed.dequantize(torch.float32, scale=scales, double_scale=scale2, block_sizes={-1: BLOCK})
    return {"": packed._quantized_data, "_scale": scales, "_scale_2": scale2, ".dequantised": values}


def by_compressed_tensors(rows: Tensor, scale2: Tensor | None) -> dict[str, Tensor]:
    """As by_modelopt, by what its compressor stores."""
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    divisor = generate_gparam(rows.min(), rows.max()) if scale2 is None else (1 / scale2).reshape(1)
    blocks = rows.unflatten(-1, (-1, BLOCK))
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, divisor)
    given = {"weight": rows, "weight_scale": scales, "weight_global_scale": divisor}
    stored = NVFP4PackedCompressor.compress(given, scheme)
    values = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
    return {name.removeprefix("weight"): tensor for name, tensor in stored.items()} | {".dequantised": values}


def by_torchao(rows: Tensor, scale2: Tensor | None) -> dict[str, Tensor]:
    """As by_modelopt, without what it dequantises to."""
    scale2 = per_tensor_amax_to_scale(rows.abs().max()) if scale2 is None else scale2
    scales, codes = nvfp4_quantize(rows[:-SUBNORMAL].contiguous(), per_tensor_scale=scale2)
    return {"": codes, "_scale": scales, "_scale_2": scale2}


def main(file: str) -> None:
    """Record."""
    rows = weight()
    tensors = {"input": rows}
    power = torch.exp2(torch.ceil(torch.log2(rows.abs().max() / 2688)))
    makers = {"modelopt": by_modelopt, "compressed-tensors": by_compressed_tensors, "torchao": by_torchao}
    for maker, make in makers.items():
        for which, scale2 in (("own", None), ("power", power)):
            made = make(rows.clone(), scale2)
            tensors |= {f"{maker}.{which}{part}": tensor.clone().contiguous() for part, tensor in made.items()}
    save_file(tensors, file, {package: version(package) for package in PACKAGES})


if __name__ == "__main__":
    main(sys.argv[1])
