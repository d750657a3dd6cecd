"""Arrays that share the memory of a tensor, and fast copies between arrays.

numpy turns a matrix ([out, in] in files is [in, out] in paddle) on one thread and against the cache: 0.5 GB/s of a
float32 matrix of 4,096 x 4,096, where the oneDNN in paddle's own wheel does 3. It moves bits alone here; rounding is
ml_dtypes', which is exact for the smallest numbers too, which the processor's own instruction takes for zero.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np

from sft import runtime

FEW = 4096
"""So few values numpy copies itself."""
PART = 1 << 20
"""Values that are converted at a time: a cache holds them."""

_TYPES = {4: 3, 2: 2}  # bytes of a value → dnnl_data_type_t: float32, bfloat16
_CPU, _IN_ORDER, _SOURCE, _TARGET = 1, 1, 1, 17
_Dims = c_int64 * 12


def dtype_of(tensor: Any) -> np.dtype[Any]:
    """numpy's dtype for a tensor's, bfloat16 as ``ml_dtypes`` has it."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)

    return np.dtype(str(tensor.dtype).rpartition(".")[2])


def array_of(tensor: Any) -> np.ndarray:
    """The values of a dense tensor on the CPU, in the same memory; bfloat16 as ``ml_dtypes`` has it.

    The array does not keep the tensor: whoever uses it does.
    """
    dtype = dtype_of(tensor)
    if not (tensor.place.is_cpu_place() and tensor.is_contiguous()):
        raise ValueError("an array shares the memory of a dense tensor on the CPU, and of no other")
    if tensor.size == 0:
        return np.empty(tensor.shape, dtype)
    memory = (ctypes.c_char * (tensor.size * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype).reshape(tensor.shape)


def copy_onto(target: np.ndarray, source: np.ndarray) -> None:
    """Give ``target`` the values of ``source``, of the same shape and any float dtype, rounded by way of float32."""
    if target.shape != source.shape:
        raise ValueError(f"values of shape {list(source.shape)} for {list(target.shape)}")
    if source.ndim != 2 or source.size <= FEW:
        target[...] = _converted(source, target.dtype)
        return
    axis = int(abs(source.strides[1]) > abs(source.strides[0]))  # along which the source goes on from part to part
    step = max(1, PART // source.shape[1 - axis])
    for start in range(0, source.shape[axis], step):
        where = (slice(None),) * axis + (slice(start, start + step),)
        _move(target[where], _converted(source[where], target.dtype))


def _converted(source: np.ndarray, dtype: Any) -> np.ndarray:
    return source if source.dtype == dtype else source.astype(np.float32, copy=False).astype(dtype, copy=False)


def _move(target: np.ndarray, source: np.ndarray) -> None:
    """Copy a matrix onto one of the same dtype."""
    size = source.itemsize
    if target.strides[0] == size == source.strides[1]:
        target, source = target.T, source.T
    rows, columns = source.shape
    turns = source.strides[0] == size == target.strides[1] and rows > 1 < columns
    apart = source.strides[1], target.strides[0]
    library = _onednn() if turns and size in _TYPES and min(apart) > 0 else None
    if library is None:
        target[...] = source
    else:
        library.turn(_TYPES[size], source.shape, [one // size for one in apart], source.ctypes.data, target.ctypes.data)


class _Argument(ctypes.Structure):
    _fields_ = (("which", c_int), ("memory", c_void_p))


class _OneDNN:
    """oneDNN's reorder of a matrix from one layout to the other. Its threads are paddle's."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
        library.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        self._engine, self._stream = c_void_p(), c_void_p()
        self._lock = threading.Lock()
        _check(library.dnnl_engine_create(byref(self._engine), _CPU, c_size_t(0)))
        _check(library.dnnl_stream_create(byref(self._stream), self._engine, _IN_ORDER))

    def turn(self, dtype: int, shape: tuple[int, ...], apart: list[int], source: int, target: int) -> None:
        """Copy a matrix from address ``source``, where its columns lie ``apart[0]`` values apart, to ``target``, where
        its rows lie ``apart[1]`` apart.

        What is made for it is given back: making it anew takes 0.03 ms, since oneDNN keeps its code.
        """
        library, made = self._library, []
        try:
            forms = [c_void_p(), c_void_p()]
            for form, strides in zip(forms, ((1, apart[0]), (apart[1], 1)), strict=True):
                dims = _Dims(*shape)
                _check(library.dnnl_memory_desc_create_with_strides(byref(form), 2, dims, dtype, _Dims(*strides)))
                made.append((library.dnnl_memory_desc_destroy, form))
            description, primitive = c_void_p(), c_void_p()
            ends = [value for form in forms for value in (form, self._engine)]
            _check(library.dnnl_reorder_primitive_desc_create(byref(description), *ends, None))
            made.append((library.dnnl_primitive_desc_destroy, description))
            _check(library.dnnl_primitive_create(byref(primitive), description))
            made.append((library.dnnl_primitive_destroy, primitive))
            memories = [c_void_p(), c_void_p()]
            for memory, form, address in zip(memories, forms, (source, target), strict=True):
                _check(library.dnnl_memory_create(byref(memory), form, self._engine, c_void_p(address)))
                made.append((library.dnnl_memory_destroy, memory))
            which = zip((_SOURCE, _TARGET), memories, strict=True)
            arguments = (_Argument * 2)(*(_Argument(place, memory) for place, memory in which))
            with self._lock:
                _check(library.dnnl_primitive_execute(primitive, self._stream, 2, arguments))
                _check(library.dnnl_stream_wait(self._stream))
        finally:
            for destroy, one in reversed(made):
                destroy(one)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN returned status {status}")


@cache
def _onednn() -> _OneDNN | None:
    """The oneDNN of the imported paddle, once it has been seen to keep every bit; None where numpy is to copy."""
    library = runtime.library("libdnnl.so.3")
    if library is None:
        return None
    try:
        found = _OneDNN(library)
        for dtype, size in ((np.uint32, 4), (np.uint16, 2)):
            bits = np.random.default_rng(0).integers(0, 1 << 8 * size, (70, 130), dtype)  # NaNs and the like among them
            turned = np.zeros((130, 100), dtype)
            found.turn(_TYPES[size], (130, 70), [130, 100], bits.ctypes.data, turned.ctypes.data)
            if not (turned[:, :70] == bits.T).all() or turned[:, 70:].any():
                return None
    except (RuntimeError, AttributeError):  # a function is missing
        return None
    return found
