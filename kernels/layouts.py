"""NVFP4 matrices under the names and in the forms of published checkpoints: ModelOpt's and compressed-tensors'.

Both keep two codes a byte, the even index in the low nibble, and E4M3 block scales. ModelOpt's global scale multiplies,
as ours does; that of compressed-tensors (format `nvfp4-pack-quantized`) divides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from palaestra.kernels.nvfp4 import NVFP4

SCALE, SCALE2 = "_scale", "_scale_2"
PACKED, GLOBAL = "_packed", "_global_scale"


def to_modelopt(name: str, quantised: NVFP4) -> dict[str, Tensor]:
    """A matrix as ModelOpt stores it: NAME uint8[N, K/2], NAME_scale float8_e4m3fn[N, K/16], NAME_scale_2 float32[]."""
    return {name: quantised.codes, f"{name}{SCALE}": quantised.scales, f"{name}{SCALE2}": quantised.scale2}


def from_modelopt(name: str, tensors: Mapping[str, Tensor]) -> NVFP4:
    """A matrix of a ModelOpt checkpoint. Raises KeyError naming the part that it lacks."""
    return NVFP4(tensors[name], tensors[f"{name}{SCALE}"], tensors[f"{name}{SCALE2}"].float().reshape(()))


def to_compressed(name: str, quantised: NVFP4) -> dict[str, Tensor]:
    """A matrix as compressed-tensors stores it: NAME_packed uint8[N, K/2], NAME_scale float8_e4m3fn[N, K/16],
    NAME_global_scale float32[1], the number of which our global scale is the reciprocal."""
    divisor = _reciprocal(quantised.scale2.reshape(1))
    return {f"{name}{PACKED}": quantised.codes, f"{name}{SCALE}": quantised.scales, f"{name}{GLOBAL}": divisor}


def from_compressed(name: str, tensors: Mapping[str, Tensor]) -> NVFP4:
    """A matrix of a compressed-tensors checkpoint. Raises KeyError naming the part that it lacks."""
    divisor = tensors[f"{name}{GLOBAL}"].float().reshape(())
    return NVFP4(tensors[f"{name}{PACKED}"], tensors[f"{name}{SCALE}"], _reciprocal(divisor))


def _reciprocal(scale: Tensor) -> Tensor:
    """The float32 whose own reciprocal is nearest to `scale`: there and back again is the same number for powers of two
    and for what is itself a reciprocal; a divisor of another maker may come back one unit in the last place away."""
    near = 1 / scale.float()
    around = torch.stack([near, torch.nextafter(near, near * 2), torch.nextafter(near, near * 0)])
    best = (1 / around - scale).abs().argmin(0, keepdim=True)
    return around.gather(0, best)[0]
