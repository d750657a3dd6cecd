"""Products of bfloat16 matrices on a CPU, by the oneDNN in paddle's own wheel.

Paddle has no operation for them. oneDNN is called where it lies in memory. It chooses its instructions by the
processor; where that has none for 16 bits it is slower than in float32. Its threads are paddle's: the wheel binds both
to one libiomp5. Rounding to bfloat16 is oneDNN's too, as paddle's takes thirty times as long (0.76 ms against 0.024 for
[1024, 576]), half as long as the product after it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import closing
from ctypes import c_char, c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from sft import dnnl, runtime
from sft.dnnl import OneDNNError, check
from sft.models.packed import Packs

FEATURES = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bfloat16; one of them is enough."""
FEW = 4096
"""So few values are rounded by paddle."""
KEPT = 256
"""How many conversions, each for one number of values, are kept ready."""

_FLOAT32, _BFLOAT16 = paddle.float32, paddle.bfloat16  # paddle looks for its types anew each time
_CPU = paddle.CPUPlace()
_BFLOAT16_INSTRUCTIONS = 0x80  # what dnnl_cpu_isa_avx512_core_bf16 and all above it have, and none below


class OneDNN:
    """The functions of oneDNN that are used here. Matrices are row-major.

    Attributes:
        multiplies_bfloat16: Whether it uses instructions for that. Without them it takes fifty times as long.
    """

    def __init__(self, library: Any) -> None:
        """Raises as :class:`sft.dnnl.Engine` does."""
        self._library, self._engine = library, dnnl.Engine(library)
        for name in ("dnnl_sgemm", "dnnl_gemm_bf16bf16f32"):
            getattr(library, name).argtypes = (
                *(c_char, c_char, c_int64, c_int64, c_int64, c_float, c_void_p, c_int64, c_void_p, c_int64),
                *(c_float, c_void_p, c_int64),
            )
        self.multiplies_bfloat16 = bool(library.dnnl_get_effective_cpu_isa() & _BFLOAT16_INSTRUCTIONS)
        self._conversions: OrderedDict[tuple[int, int], dnnl.Reorder] = OrderedDict()

    def product(
        self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, out: Any | None = None
    ) -> Any:
        """x · y of two matrices, both bfloat16 or both float32, each transposed first where that is said → float32.
        An x that is not transposed may have more dimensions, [..., in] → [..., out].

        ``out``, float32, is what the product is added to, and what is returned; it is changed, and has as many rows,
        in whatever dimensions.
        """
        types, shape, other = (x.dtype, y.dtype), x.shape, y.shape
        fit = len(other) == 2 and (len(shape) == 2 or (len(shape) > 2 and not transpose_x))
        if types[0] != types[1] or types[0] not in (_BFLOAT16, _FLOAT32) or not fit:
            raise ValueError(f"product of {types[0]} {shape} and {types[1]} {other}")
        x, y = _dense(x), _dense(y)
        *before, inner = shape[::-1] if transpose_x else shape
        into, columns = other[::-1] if transpose_y else other
        rows = math.prod(before)
        wrong = inner != into
        if out is not None:
            wrong = wrong or out.dtype != _FLOAT32 or out.shape[-1] != columns or math.prod(out.shape[:-1]) != rows
        if wrong:
            onto = "" if out is None else f" onto {out.dtype} {out.shape}"
            raise ValueError(f"product of {[*before, inner]} and {[into, columns]}{onto}")
        if out is not None and not out.is_contiguous():
            raise ValueError("what a product is added to must lie in one piece")
        total = 0.0 if out is None else 1.0
        if out is None:
            out = _empty([*before, columns], _FLOAT32)
        if 0 in (rows, columns, inner):
            return out if total else out.zero_()
        library = self._library
        multiply = library.dnnl_sgemm if types[0] == _FLOAT32 else library.dnnl_gemm_bf16bf16f32
        transposes = (b"T" if transpose_x else b"N", b"T" if transpose_y else b"N")
        factors = (1.0, x.data_ptr(), shape[-1], y.data_ptr(), other[-1])
        check(multiply(*transposes, rows, columns, inner, *factors, total, out.data_ptr(), columns))
        return out

    def packs(self) -> Packs:
        """For products of few rows with the same matrices again and again."""
        return Packs(self._engine if self.multiplies_bfloat16 else None)

    def rounded(self, x: Any) -> Any:
        """``x`` of any shape, float32, rounded to the nearest bfloat16."""
        return self._converted(x, _FLOAT32, _BFLOAT16)

    def widened(self, x: Any) -> Any:
        """``x`` of any shape, bfloat16, as float32."""
        return self._converted(x, _BFLOAT16, _FLOAT32)

    def _converted(self, x: Any, expected: Any, dtype: Any) -> Any:
        if x.dtype != expected:
            raise ValueError(f"{x.dtype} where {expected} is converted")
        count = math.prod(x.shape)  # ``x.size`` takes 25 times as long
        if count <= FEW:
            return x.astype(dtype)
        x = _dense(x)
        out = _empty(x.shape, dtype)
        types = (dnnl.FLOAT32, dnnl.BFLOAT16) if dtype == _BFLOAT16 else (dnnl.BFLOAT16, dnnl.FLOAT32)
        with self._engine.lock:
            key = (count, types[0])
            conversion = self._conversions.pop(key, None)
            if conversion is None:
                conversion = dnnl.Reorder(self._engine, key[:1], *((one, (1,)) for one in types))
            self._conversions[key] = conversion
            while len(self._conversions) > KEPT:
                self._conversions.popitem(last=False)[1].close()
            conversion.run(x.data_ptr(), out.data_ptr())
        return out


def _dense(x: Any) -> Any:
    return x if x.is_contiguous() else x.contiguous()


def _empty(shape: list[int], dtype: Any) -> Any:
    """On the CPU, of any values. (``paddle.empty`` takes three times as long.)"""
    return paddle._C_ops.empty(shape, dtype, _CPU)


def onednn() -> OneDNN:
    """The oneDNN of the imported paddle; raises :class:`OneDNNError` where it cannot be used."""
    found = _found()
    if isinstance(found, str):
        raise OneDNNError(found)
    return found


@cache
def _found() -> OneDNN | str:
    """The oneDNN of the imported paddle, once its results have been compared with numpy's; or why it is not
    used."""
    library = dnnl.library()
    if library is None:
        return "paddle's oneDNN is not in this build of paddle"
    try:
        found = OneDNN(library)
        wrong = _wrong(found)
    except (OneDNNError, AttributeError) as error:  # a function is missing
        return str(error)
    return f"paddle's oneDNN computes {wrong} wrongly" if wrong else found


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
    few, matrix = (found.rounded(paddle.to_tensor(one)) for one in (values[0, :9], values[1:].reshape([70, 160])))
    matrix.persistable = True
    with closing(found.packs()) as packs:
        packed = packs.product(few.unsqueeze(1), matrix, transposed=False)
    if packed is None:
        return None
    expected = nearest[0, :9].astype(np.float64) @ nearest[1:].reshape([70, 160])
    return (
        None if np.abs(packed.numpy()[:, 0] - expected).max() < 1e-5 * math.sqrt(70) else "products of packed matrices"
    )


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
