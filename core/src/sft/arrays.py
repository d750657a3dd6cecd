"""Arrays that share the memory of a tensor, and fast copies between arrays.

numpy turns a matrix ([out, in] in files is [in, out] in paddle) on one thread and against the cache: 0.5 GB/s of a
float32 matrix of 4,096 x 4,096, where the oneDNN in paddle's own wheel does 3. It moves bits alone here; rounding is
ml_dtypes', which is exact for the smallest numbers too, which the processor's own instruction takes for zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from typing import Any

import numpy as np

from sft import dnnl

FEW = 4096
"""So few values numpy copies itself."""
PART = 1 << 20
"""Values that are converted at a time: a cache holds them."""

_TYPES = {4: dnnl.FLOAT32, 2: dnnl.BFLOAT16}
"""By the bytes of a value, in what type oneDNN moves its bits."""


def dtype_of(tensor: Any) -> np.dtype[Any]:
    """numpy's dtype for a tensor's, bfloat16 as ``ml_dtypes`` has it."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)

    return np.dtype(str(tensor.dtype).rpartition(".")[2])


def array_of(tensor: Any) -> np.ndarray:
    """The values of a dense tensor on the CPU, in the same memory; bfloat16 as ``ml_dtypes`` has it.

    The array does not keep the tensor: whoever uses it does. Raises :class:`ValueError` for any other tensor.
    """
    dtype = dtype_of(tensor)
    if not (tensor.place.is_cpu_place() and tensor.is_contiguous()):
        raise ValueError("an array shares the memory of a dense tensor on the CPU, and of no other")
    if tensor.size == 0:
        return np.empty(tensor.shape, dtype)
    memory = (ctypes.c_char * (tensor.size * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype).reshape(tensor.shape)


def copy_onto(target: np.ndarray, source: np.ndarray) -> None:
    """Give ``target`` the values of ``source``, of the same shape (else it raises :class:`ValueError`) and any float
    dtype, rounded by way of float32."""
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
    apart = source.strides[1] // size, target.strides[0] // size
    engine = _onednn() if turns and size in _TYPES and min(apart) > 0 else None
    if engine is None:
        target[...] = source
    else:
        _turn(engine, _TYPES[size], source.shape, apart, source.ctypes.data, target.ctypes.data)


def _turn(
    engine: dnnl.Engine, dtype: int, shape: Sequence[int], apart: Sequence[int], source: int, target: int
) -> None:
    """Copy a matrix from address ``source``, where its columns lie ``apart[0]`` values apart, to ``target``, where its
    rows lie ``apart[1]`` apart."""
    reorder = dnnl.Reorder(engine, shape, (dtype, (1, apart[0])), (dtype, (apart[1], 1)))
    with closing(reorder), engine.lock:
        reorder.run(source, target)


@cache
def _onednn() -> dnnl.Engine | None:
    """The oneDNN of the imported paddle, once it has been seen to keep every bit; None where numpy is to copy."""
    library = dnnl.library()
    if library is None:
        return None
    try:
        engine = dnnl.Engine(library)
        for dtype, size in ((np.uint32, 4), (np.uint16, 2)):
            bits = np.random.default_rng(0).integers(0, 1 << 8 * size, (70, 130), dtype)  # NaNs and the like among them
            turned = np.zeros((130, 100), dtype)
            _turn(engine, _TYPES[size], (130, 70), (130, 100), bits.ctypes.data, turned.ctypes.data)
            if not (turned[:, :70] == bits.T).all() or turned[:, 70:].any():
                return None
    except (dnnl.OneDNNError, AttributeError):  # a function is missing
        return None
    return engine
