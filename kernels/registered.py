"""Operations that PyTorch knows by name: one node each in what torch.compile and torch.export capture.

`torch.library.custom_op` would do, but its first call imports PyTorch's compiler: two seconds in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def register(name: str, function: Function, empty: Function, schema: str | None = None) -> Function:
    """Register `palaestra::NAME` and return it. `empty`: tensors of the result's shapes, from the same arguments;
    `schema`: of arguments that the function's annotations do not tell."""
    qualified = f"palaestra::{name}"
    torch.library.define(qualified, schema or torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, empty)
    found: Function = getattr(torch.ops.palaestra, name).default
    return found


def differentiate(operation: Function, backward: Function, remember: Function) -> None:
    """Register its gradients; `remember(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""
    torch.library.register_autograd(operation, backward, setup_context=remember)  # type: ignore[arg-type]
