"""Mamba-2 in C: the operations of `mamba.py` as PyTorch knows them, with their gradients and shapes.

Arguments are those of the functions there; float32 on the CPU, widths multiples of 16, starts bool or None.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palaestra.kernels import native
from palaestra.kernels.native import KINDS, floats, pointer
from palaestra.kernels.registered import differentiate, register

if TYPE_CHECKING:
    from palaestra.kernels.mamba import Mixer, Slots

SHARES = 4
"""Into how many parts the heads of a sequence are divided at least, if their number allows."""
GATE_ROWS = 64
"""GATE_ROWS of cpu/records.h."""

Given = dict[str, Tensor | None]


def _call(name: str, record: Any) -> None:
    found = native.library()
    assert found is not None
    if getattr(found, name)(ctypes.byref(record), torch.get_num_threads()):
        raise MemoryError(f"no memory for {name.replace('_', ' ')}")


def _pointers(tensors: Given) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def _rows(tensor: Tensor, inner: int) -> Tensor:
    """[B, L, ...], or a copy, such that the last `inner` dimensions are contiguous and tokens evenly apart."""
    token = tensor[0, 0] if tensor.numel() else tensor
    even = tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if token.is_contiguous() and even else tensor.contiguous()


def _contiguous(**tensors: Tensor | None) -> Given:
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


# -- the recurrence over sequences


def _scan_record(inputs: tuple[Tensor | None, ...], others: Given) -> tuple[native.Scan, Given]:
    """The record, and the tensors that it points to."""
    x, dt, a, b, c, d, initial, starts = inputs
    assert x is not None
    assert b is not None
    assert c is not None
    x, b, c = _rows(x, 2), _rows(b, 2), _rows(c, 2)
    (batch, length, heads, dim), (groups, state) = x.shape, b.shape[2:]
    given = {"x": x, "b": b, "c": c, **_contiguous(dt=dt, a=a, d=d, initial=initial, starts=starts), **others}
    record = native.Scan(
        **_pointers(given),
        **{"batch": batch, "length": length, "heads": heads, "dim": dim, "groups": groups, "state": state},
        **{"x_stride": x.stride(1), "b_stride": b.stride(1), "c_stride": c.stride(1), "shares": _shares(heads, groups)},
    )
    return record, given


def _shares(heads: int, groups: int) -> int:
    """Into how many parts a group's heads are divided. Neither the batch nor the threads matter: no number depends on
    them."""
    return math.gcd(heads // groups, max(1, SHARES // groups))


def _scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See mamba.scan."""
    y, last = floats(*x.shape), floats(x.shape[0], *x.shape[2:], b.shape[-1])
    record, _kept = _scan_record((x, dt, a, b, c, d, state, starts), {"y": y, "last": last})
    _call("scan_forward", record)
    return y, last


def _scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, a, b, c, d and the first state (empty, if that is None)."""
    batch, heads = x.shape[0], x.shape[2]
    shares = _shares(heads, b.shape[2])
    dx, ddt = floats(*x.shape), floats(*dt.shape)
    da, dd = floats(batch, heads), floats(batch, heads)
    db, dc = floats(shares, *b.shape), floats(shares, *b.shape)
    dstate = floats(*(0,) if state is None else state.shape)
    found = {"dx": dx, "ddt": ddt, "da": da, "db": db, "dc": dc, "dd": dd, "dinitial": dstate}
    given = {**_contiguous(dy=dy, dlast=dlast), **found}
    record, _kept = _scan_record((x, dt, a, b, c, d, state, starts), given)
    _call("scan_backward", record)
    return dx, ddt, da.sum(0), _sum(db), _sum(dc), dd.sum(0), dstate


def _sum(parts: Tensor) -> Tensor:
    return parts.squeeze(0) if len(parts) == 1 else parts.sum(0)


def _scan_room(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *x.shape[2:], b.shape[-1])


def _scan_backward_room(dy: Tensor, dlast: Tensor | None, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    *others, state, _ = inputs
    return (*(t.new_empty(t.shape) for t in others if t is not None), dy.new_empty(0 if state is None else state.shape))


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _scan_gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    x, *_, state, _ = ctx.saved_tensors
    *found, dstate = scan_backward(torch.zeros_like(x) if dy is None else dy, dlast, *ctx.saved_tensors)
    return *found, None if state is None else dstate, None


scan = register("scan", _scan, _scan_room)
scan_backward = register("scan_backward", _scan_backward, _scan_backward_room)
differentiate(scan, _scan_gradients, _keep)


# -- the convolution


def _convolution_record(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, others: Given
) -> tuple[native.Convolution, Given]:
    x = _rows(x, 1)
    given = {"x": x, **_contiguous(weight=weight.T, bias=bias, starts=starts), **others}
    batch, length, width = x.shape
    return native.Convolution(
        **_pointers(given), batch=batch, length=length, width=width, kernel=weight.shape[1], x_stride=x.stride(1)
    ), given


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """See mamba.convolve."""
    y = floats(*x.shape)
    record, _kept = _convolution_record(x, weight, bias, starts, {"y": y})
    _call("convolution_forward", record)
    return y


def _convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width, kernel = weight.shape
    dx, dweight = floats(*x.shape), floats(len(x), kernel + 1, width)
    given = {**_contiguous(dy=dy), "dx": dx, "dweight": dweight}
    record, _kept = _convolution_record(x, weight, bias, starts, given)
    _call("convolution_backward", record)
    total = dweight.sum(0)
    return dx, total[:kernel].T.contiguous(), total[kernel].clone()


def _convolve_room(x: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _convolve_backward_room(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weight, bias))


def _convolve_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *convolve_backward(dy, *ctx.saved_tensors), None


convolve = register("convolve", _convolve, _convolve_room)
convolve_backward = register("convolve_backward", _convolve_backward, _convolve_backward_room)
differentiate(convolve, _convolve_gradients, _keep)


# -- gate and norm


def _gate_record(y: Tensor, z: Tensor, weight: Tensor, form: tuple[int, float], others: Given) -> tuple[Any, Given]:
    z = _rows(z, 1)
    given = {"z": z, **_contiguous(y=y, weight=weight), **others}
    width, (groups, eps) = len(weight), form
    sizes = {"rows": y.numel() // width, "width": width, "groups": groups, "z_stride": z.stride(1)}
    return native.Gate(**_pointers(given), **sizes, eps=eps), given


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See mamba.gated_norm."""
    out = floats(*y.shape)
    record, _kept = _gate_record(y, z, weight, (groups, eps), {"out": out})
    _call("gate_forward", record)
    return out


def _gated_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz = floats(*y.shape), floats(*z.shape)
    dweight = floats(-(-y.numel() // len(weight) // GATE_ROWS), len(weight))
    given = {**_contiguous(dout=dout), "dy": dy, "dz": dz, "dweight": dweight}
    record, _kept = _gate_record(y, z, weight, (groups, eps), given)
    _call("gate_backward", record)
    return dy, dz, dweight.sum(0)


def _gated_norm_room(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return y.new_empty(y.shape)


def _gated_norm_backward_room(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (y, z, weight))


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, groups, eps = inputs
    ctx.form = groups, eps
    ctx.save_for_backward(*tensors)


def _gate_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_norm_backward(dout, *ctx.saved_tensors, *ctx.form), None, None


gated_norm = register("gated_norm", _gated_norm, _gated_norm_room)
gated_norm_backward = register("gated_norm_backward", _gated_norm_backward, _gated_norm_backward_room)
differentiate(gated_norm, _gate_gradients, _keep_gate)


# -- a step of decoding


def mixer_record(mixer: Mixer) -> native.Mamba:
    """The record of contiguous weights. It points to them, so that it sees them change in place."""
    names = ("conv", "conv_bias", "dt_bias", "a", "d", "norm")
    weights = {name: pointer(getattr(mixer, name)) for name in names}
    sizes = {"heads": mixer.heads, "dim": mixer.dim, "state": mixer.state, "groups": mixer.groups}
    return native.Mamba(**weights, **sizes, kernel=len(mixer.conv), dt_min=mixer.dt_min)


def step(mixer: Mixer, parts: Tensor, slots: Slots, rows: Tensor, seed: int) -> Tensor:
    """See mamba.step."""
    found = native.library()
    assert found is not None
    parts, rows = parts.contiguous(), rows.to(torch.int64).contiguous()
    count, stride = parts.shape
    y = parts.new_empty(count, mixer.width)
    places = parts.data_ptr(), y.data_ptr(), rows.data_ptr()
    states = slots.states
    kept = native.Kept(pointer(slots.windows), pointer(states), len(states), KINDS[states.dtype])
    call = native.MambaStep(ctypes.addressof(mixer.record), *places, kept, count, stride, seed, mixer.eps)
    refused = found.mamba_step(ctypes.byref(call), torch.get_num_threads())
    if refused == native.NO_SLOT:
        check(rows, len(states))
    if refused:
        raise MemoryError(f"no memory for a step of {count} conversations")
    return y


def check(rows: Tensor, count: int) -> None:
    """Raises IndexError for rows int64[n] that are none of `count` slots."""
    at = rows.tolist()
    if at and not 0 <= min(at) <= max(at) < count:
        raise IndexError(f"rows from 0 to {count - 1}; got {at}")
