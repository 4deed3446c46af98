"""Products of ggml, llama.cpp's kernels, as candidates for `take_turns`: what `ggml_build.py` made, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import weakref
from collections.abc import Callable
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_long, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from ggml_build import build
from torch import Tensor
from turns import bare

FOLDER = Path(__file__).parents[1] / "build" / "peers"
F32 = 0
TYPES = {"BF16": 30, "Q8_0": 8, "Q4_0": 2, "Q4_K": 12, "MXFP4": 39, "NVFP4": 40}
"""`enum ggml_type`."""
ERRORS = {"BF16": 0.004, "Q8_0": 0.01, "Q4_0": 0.1, "Q4_K": 0.09, "MXFP4": 0.13, "NVFP4": 0.11}
"""The most that a product may be off the float32 one of normal weights and activations, relative to its norm."""
ROUNDED = 0.02
"""The most that it may be off the product with the dequantised weight: ggml rounds activations to bf16 or int8."""
NODES = 4
"""Room for a graph's nodes, of which a product is one."""
QUIET = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
"""In place of ggml's log, which has a line for every weight that is laid out anew."""


class Parameters(Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Pool(Structure):
    """`struct ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class Traits(Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("interleave", c_int64),
        ("size", c_size_t),
        ("quantised", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


FUNCTIONS = {
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, Parameters),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_get_type_traits": (POINTER(Traits), c_int),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_threadpool_params_init": (None, POINTER(Pool), c_int),
    "ggml_threadpool_new": (c_void_p, POINTER(Pool)),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "rows_multiply": (None, c_int, c_void_p, c_long, c_long, c_void_p, c_long, c_void_p, c_void_p),
}
"""What a function returns, and its arguments."""


@functools.cache
def library() -> ctypes.CDLL:
    """ggml, built where it is not there yet."""
    found = ctypes.CDLL(str(build(FOLDER)))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.ggml_log_set(QUIET, None)
    return found


@functools.cache
def backend(threads: int) -> int:
    """The CPU backend, with threads that stay."""
    native, pool = library(), Pool()
    made: int = native.ggml_backend_cpu_init()
    native.ggml_threadpool_params_init(pool, threads)
    native.ggml_backend_cpu_set_n_threads(made, threads)
    native.ggml_backend_cpu_set_threadpool(made, native.ggml_threadpool_new(pool))
    return made


@functools.cache
def extra_buffer_types() -> dict[str, int]:
    """Layouts of weights, by name, that this machine's kernels like better than the plain one, each for some types."""
    native = library()
    address = native.ggml_backend_reg_get_proc_address(
        native.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(native.ggml_backend_get_device(backend(1)))
    found = itertools.takewhile(bool, (types[i] for i in itertools.count()))
    return {native.ggml_backend_buft_name(kind).decode(): kind for kind in found}


def nbytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a weight."""
    return rows * int(library().ggml_row_size(TYPES[kind], columns))


def quantize(kind: str, weight: Tensor) -> Tensor:
    """float32 [rows, columns] -> uint8 [bytes]."""
    codes = torch.empty(nbytes(kind, *weight.shape), dtype=torch.uint8)
    library().ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), codes.data_ptr(), 0, *weight.shape, None)
    return codes


def dequantize(kind: str, codes: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [bytes] -> float32 [rows, columns]."""
    values = torch.empty(rows, columns)
    traits = library().ggml_get_type_traits(TYPES[kind]).contents
    traits.to_float(codes.data_ptr(), values.data_ptr(), values.numel())
    return values


@dataclass(frozen=True)
class Case:
    """Products of `batch` rows of activations with `copies` weights [rows, columns] in turn."""

    kind: str
    rows: int
    columns: int
    copies: int
    batch: int
    threads: int


class Graphs:
    """Calls that compute the next of the weights' graphs, each of one product, as llama.cpp does.

    Raises ValueError where the backend has no product with such a weight in such a buffer.
    """

    def __init__(self, case: Case, codes: Tensor, x: Tensor, buffer_type: int) -> None:
        native = self.native = library()
        self.backend = backend(case.threads)
        self.shape = (case.batch, case.rows)
        weights, work = self._context(case.copies, 0), self._context(1 + case.copies, case.copies)
        tensors = [
            native.ggml_new_tensor_2d(weights, TYPES[case.kind], case.columns, case.rows) for _ in range(case.copies)
        ]
        self._allocate(weights, buffer_type)
        activations = native.ggml_new_tensor_2d(work, F32, case.columns, case.batch)
        self._allocate(work, native.ggml_backend_cpu_buffer_type())
        self.products = [native.ggml_mul_mat(work, tensor, activations) for tensor in tensors]
        if not native.ggml_backend_dev_supports_op(native.ggml_backend_get_device(self.backend), self.products[0]):
            raise ValueError(f"no product with {case.kind} in such a buffer")
        native.ggml_backend_tensor_set(activations, x.data_ptr(), 0, x.nbytes)
        for tensor in tensors:
            native.ggml_backend_tensor_set(tensor, codes.data_ptr(), 0, codes.nbytes)
        self.weights = [native.ggml_get_data(tensor) for tensor in tensors]
        self.following = itertools.cycle(self._graphs(work))

    def __call__(self) -> None:
        self.native.ggml_backend_graph_compute(self.backend, next(self.following))

    def results(self) -> Tensor:
        """float32 [batch, rows]: what the last call computed. All graphs write it to one place."""
        y = torch.empty(self.shape)
        self.native.ggml_backend_tensor_get(self.products[0], y.data_ptr(), 0, y.nbytes)
        return y

    def _graphs(self, context: int) -> list[int]:
        native = self.native
        allocator = native.ggml_gallocr_new(native.ggml_backend_cpu_buffer_type())
        weakref.finalize(self, native.ggml_gallocr_free, allocator)
        graphs = [native.ggml_new_graph_custom(context, NODES, False) for _ in self.products]
        for graph, product in zip(graphs, self.products, strict=True):
            native.ggml_build_forward_expand(graph, product)
            if not native.ggml_gallocr_alloc_graph(allocator, graph):
                raise MemoryError("no memory for a product")
        return graphs

    def _context(self, tensors: int, graphs: int) -> int:
        """Room for what describes tensors and graphs; their values lie elsewhere."""
        native = self.native
        size = tensors * native.ggml_tensor_overhead() + graphs * native.ggml_graph_overhead_custom(NODES, False)
        context: int = native.ggml_init(Parameters(size, None, True))
        weakref.finalize(self, native.ggml_free, context)
        return context

    def _allocate(self, context: int, buffer_type: int) -> None:
        """Memory for the context's tensors."""
        buffer = self.native.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError("no memory for ggml's tensors")
        weakref.finalize(self, self.native.ggml_backend_buffer_free, buffer)


class Rows:
    """Calls of the bare dot product over the rows of the next of the weights, on one thread: no graph is paid for."""

    def __init__(self, case: Case, graphs: Graphs, x: Tensor) -> None:
        self.y, rounded = torch.empty(case.batch, case.rows), torch.empty_like(x)  # more than room enough
        self.tensors = (graphs, x, rounded)  # those below are addresses of theirs
        self.following = itertools.cycle([c_void_p(weight) for weight in graphs.weights])
        self.rest = (
            c_long(case.rows),
            c_long(case.columns),
            c_void_p(x.data_ptr()),
            c_long(case.batch),
            c_void_p(rounded.data_ptr()),
            c_void_p(self.y.data_ptr()),
        )
        self.multiply, self.type = bare(build(FOLDER), "rows_multiply"), c_int(TYPES[case.kind])

    def __call__(self) -> None:
        self.multiply(self.type, next(self.following), *self.rest)

    def results(self) -> Tensor:
        """float32 [batch, rows]: what the last call computed."""
        return self.y


def candidates(case: Case) -> dict[str, Callable[[], None]]:
    """ggml's ways to this product, of which the fastest is its time: a graph for each layout that the weight can have,
    and on one thread the bare dot product. Weights and activations are normal.

    Raises ArithmeticError for a way whose numbers are off.
    """
    weight, x = torch.randn(case.rows, case.columns), torch.randn(case.batch, case.columns)
    codes = quantize(case.kind, weight)
    plain = Graphs(case, codes, x, library().ggml_backend_cpu_buffer_type())
    found: dict[str, Graphs | Rows] = {"plain": plain}
    for name, buffer_type in extra_buffer_types().items():
        with contextlib.suppress(ValueError):  # this layout is for other types
            found[name] = Graphs(case, codes, x, buffer_type)
    if case.threads == 1:
        found["rows"] = Rows(case, plain, x)
    exact = x @ weight.T, x @ dequantize(case.kind, codes, *weight.shape).T
    for name, way in found.items():
        way()
        check(f"{case.kind}, {name}", way.results(), *exact, ERRORS[case.kind])
    return dict(found)


def check(name: str, y: Tensor, full: Tensor, rounded: Tensor, most: float) -> None:
    """Whether a product is within `most` of that with the full weight, and within ROUNDED of that with the dequantised
    one. Raises ArithmeticError."""
    for exact, bound in ((full, most), (rounded, ROUNDED)):
        off = float((y - exact).norm() / exact.norm())
        if not off < bound:
            raise ArithmeticError(f"{name}: ggml's product is {off:.4f} off, which may be {bound}")
