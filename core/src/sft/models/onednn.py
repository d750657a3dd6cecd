"""Products of bfloat16 matrices on a CPU, by the oneDNN in paddle's own wheel.

Paddle has no operation for them. oneDNN is called where it lies in memory. It chooses its instructions by the
processor; where that has none for 16 bits it is slower than in float32. Its threads are paddle's: the wheel binds both
to one libiomp5. Rounding to bfloat16 is oneDNN's too, as paddle's takes thirty times as long (0.76 ms against 0.024 for
[1024, 576]), half as long as the product after it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections import OrderedDict
from ctypes import byref, c_char, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from sft import runtime

FEATURES = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bfloat16; one of them is enough."""
FEW = 4096
"""So few values are rounded by paddle."""
KEPT = 256
"""How many conversions, each for one number of values, are kept ready."""

_BFLOAT16, _FLOAT32 = 2, 3  # dnnl_data_type_t
_BFLOAT16_INSTRUCTIONS = 0x80  # what dnnl_cpu_isa_avx512_core_bf16 and all above it have, and none below
_CPU, _IN_ORDER, _LINE = 1, 1, 2  # dnnl_engine_kind_t, dnnl_stream_flags_t, dnnl_format_tag_t "a"
_SOURCE, _TARGET = 1, 17  # DNNL_ARG_FROM, DNNL_ARG_TO
_Dims = c_int64 * 12


class _Version(ctypes.Structure):
    _fields_ = (
        *(("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p)),
        *(("cpu_runtime", c_uint), ("gpu_runtime", c_uint)),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("which", c_int), ("memory", c_void_p))


class OneDNNError(RuntimeError):
    """oneDNN could not do what it was asked for."""


class OneDNN:
    """The functions of oneDNN that are used here. Matrices are row-major.

    Attributes:
        multiplies_bfloat16: Whether it uses instructions for that. Without them it takes fifty times as long.
    """

    def __init__(self, library: Any) -> None:
        """Raises :class:`OneDNNError` where the library is another than this was written for."""
        self._library = library
        library.dnnl_version.restype = ctypes.POINTER(_Version)
        version = library.dnnl_version().contents
        if version.major != 3:
            raise OneDNNError(f"is version {version.major}.{version.minor}, and 3 is known here")
        for name in ("dnnl_sgemm", "dnnl_gemm_bf16bf16f32"):
            getattr(library, name).argtypes = (
                *(c_char, c_char, c_int64, c_int64, c_int64, c_float, c_void_p, c_int64, c_void_p, c_int64),
                *(c_float, c_void_p, c_int64),
            )
        library.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
        library.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        self.multiplies_bfloat16 = bool(library.dnnl_get_effective_cpu_isa() & _BFLOAT16_INSTRUCTIONS)
        self._engine, self._stream = c_void_p(), c_void_p()
        _check(library.dnnl_engine_create(byref(self._engine), _CPU, c_size_t(0)))
        _check(library.dnnl_stream_create(byref(self._stream), self._engine, _IN_ORDER))
        self._lock = threading.Lock()
        self._conversions: OrderedDict[tuple[int, int], _Conversion] = OrderedDict()

    def product(
        self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, out: Any | None = None
    ) -> Any:
        """x · y of two matrices, both bfloat16 or both float32, each transposed first where that is said → float32.

        ``out``, float32, is what the product is added to, and what is returned; it is changed.
        """
        if x.dtype != y.dtype or x.dtype not in (paddle.bfloat16, paddle.float32) or x.ndim != 2 or y.ndim != 2:
            raise ValueError(f"product of {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")
        x, y = _dense(x), _dense(y)
        (rows, inner), (other, columns) = (
            shape[::-1] if transposed else shape
            for shape, transposed in ((x.shape, transpose_x), (y.shape, transpose_y))
        )
        if inner != other or (out is not None and (out.shape != [rows, columns] or out.dtype != paddle.float32)):
            onto = "" if out is None else f" onto {out.dtype} {list(out.shape)}"
            raise ValueError(f"product of [{rows}, {inner}] and [{other}, {columns}]{onto}")
        if out is not None and not out.is_contiguous():
            raise ValueError("what a product is added to must lie in one piece")
        total = 0.0 if out is None else 1.0
        if out is None:
            out = paddle.empty([rows, columns], "float32")
        if 0 in (rows, columns, inner):
            return out if total else out.zero_()
        library = self._library
        multiply = library.dnnl_sgemm if x.dtype == paddle.float32 else library.dnnl_gemm_bf16bf16f32
        transposes = (b"T" if transpose_x else b"N", b"T" if transpose_y else b"N")
        factors = (1.0, x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1])
        _check(multiply(*transposes, rows, columns, inner, *factors, total, out.data_ptr(), columns))
        return out

    def rounded(self, x: Any) -> Any:
        """``x`` of any shape, float32, rounded to the nearest bfloat16."""
        return self._converted(x, paddle.float32, "bfloat16")

    def widened(self, x: Any) -> Any:
        """``x`` of any shape, bfloat16, as float32."""
        return self._converted(x, paddle.bfloat16, "float32")

    def _converted(self, x: Any, expected: Any, dtype: str) -> Any:
        if x.dtype != expected:
            raise ValueError(f"{x.dtype} where {expected} is converted")
        if x.size <= FEW:
            return x.astype(dtype)
        x = _dense(x)
        out = paddle.empty(x.shape, dtype)
        source, target = (_FLOAT32, _BFLOAT16) if dtype == "bfloat16" else (_BFLOAT16, _FLOAT32)
        with self._lock:  # a conversion has one place for its two addresses
            key = (int(x.size), source)
            conversion = self._conversions.pop(key, None)
            if conversion is None:
                conversion = _Conversion(self._library, self._engine, key[0], source, target)
            self._conversions[key] = conversion
            while len(self._conversions) > KEPT:
                self._conversions.popitem(last=False)[1].close()
            conversion.run(self._stream, x.data_ptr(), out.data_ptr())
        return out


class _Conversion:
    """A line of values of one type to another type."""

    def __init__(self, library: Any, engine: c_void_p, count: int, source: int, target: int) -> None:
        self._library = library
        self._forms, self._memories = [c_void_p(), c_void_p()], [c_void_p(), c_void_p()]
        for form, dtype in zip(self._forms, (source, target), strict=True):
            _check(library.dnnl_memory_desc_create_with_tag(byref(form), 1, _Dims(count), dtype, _LINE))
        description, self._primitive = c_void_p(), c_void_p()
        forms = [value for form in self._forms for value in (form, engine)]
        _check(library.dnnl_reorder_primitive_desc_create(byref(description), *forms, None))
        _check(library.dnnl_primitive_create(byref(self._primitive), description))
        library.dnnl_primitive_desc_destroy(description)
        for memory, form in zip(self._memories, self._forms, strict=True):
            _check(library.dnnl_memory_create(byref(memory), form, engine, None))
        self._arguments = (_Argument * 2)(
            *(_Argument(which, memory) for which, memory in zip((_SOURCE, _TARGET), self._memories, strict=True))
        )

    def run(self, stream: c_void_p, source: int, target: int) -> None:
        for memory, address in zip(self._memories, (source, target), strict=True):
            _check(self._library.dnnl_memory_set_data_handle(memory, address))
        _check(self._library.dnnl_primitive_execute(self._primitive, stream, 2, self._arguments))
        _check(self._library.dnnl_stream_wait(stream))

    def close(self) -> None:
        """Give back what it holds; it is not to be run any more."""
        for memory in self._memories:
            self._library.dnnl_memory_destroy(memory)
        self._library.dnnl_primitive_destroy(self._primitive)
        for form in self._forms:
            self._library.dnnl_memory_desc_destroy(form)


def _check(status: int) -> None:
    if status:
        raise OneDNNError(f"returned status {status}")


def _dense(x: Any) -> Any:
    return x if x.is_contiguous() else x.contiguous()


def onednn() -> OneDNN:
    """The oneDNN of the imported paddle; raises :class:`OneDNNError` where it cannot be used."""
    found = _found()
    if isinstance(found, str):
        raise OneDNNError(f"paddle's oneDNN {found}")
    return found


@cache
def _found() -> OneDNN | str:
    """The oneDNN of the imported paddle, once its results have been compared with numpy's; or why it is not used, as
    the end of a sentence that begins with paddle's oneDNN."""
    library = runtime.library("libdnnl.so.3")
    if library is None:
        return "is not in this build of paddle"
    try:
        found = OneDNN(library)
        wrong = _wrong(found)
    except (OneDNNError, AttributeError) as error:  # a function is missing
        return str(error)
    return f"computes {wrong} wrongly" if wrong else found


def _wrong(found: OneDNN) -> str | None:
    """What of ``found`` gives other numbers than numpy; None where all is right."""
    random = np.random.default_rng(0)
    values = random.standard_normal((3, 80, 70)).astype(np.float32)
    size = values.size
    nearest = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    rounded = found.rounded(paddle.to_tensor(values))
    if size <= FEW or not (found.widened(rounded).numpy() == nearest).all():
        return "bfloat16 numbers"
    for dtype, exact in (("bfloat16", nearest), ("float32", values)):
        x, y, onto = (paddle.to_tensor(one) for one in exact)
        x, y = (found.rounded(one) if dtype == "bfloat16" else one for one in (x, y))
        for transpose_x in (False, True):
            wide = [one.astype(np.float64) for one in exact]
            expected = wide[0].T @ wide[1] if transpose_x else wide[0] @ wide[1].T
            size = expected.shape[0]
            out = onto[:size, :size].clone() if size == 70 else None
            expected = expected if out is None else expected + wide[2][:size, :size]
            product = found.product(x, y, transpose_x, not transpose_x, out).numpy()
            if not np.abs(product - expected).max() < 1e-5 * math.sqrt(80):
                return f"{dtype} products"
    return None


def why_not() -> str | None:
    """Why this CPU does not multiply bfloat16 matrices faster than float32; None where it does."""
    if not set(FEATURES) & runtime.cpu_flags():
        return f"this processor has neither {' nor '.join(FEATURES)}"
    try:
        found = onednn()
    except OneDNNError as error:
        return str(error)
    if not found.multiplies_bfloat16:
        return "paddle's oneDNN does not use this processor's instructions for it (ONEDNN_MAX_CPU_ISA can forbid them)"
    return None
