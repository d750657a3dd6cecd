"""What a tensor of weights may hold: finite real numbers, of 16 bits or more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

_REAL = ("float64", "float32", "float16", "bfloat16")
_PART = 1 << 18
"""Values that are looked at together: a cache holds them."""


def with_bfloat16(array: np.ndarray) -> np.ndarray:
    """``array`` with bfloat16 as ``ml_dtypes`` has it, where uint16 stands for it, as paddle has it in numpy."""
    import ml_dtypes
    import numpy as np

    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def check_reals(array: np.ndarray, whose: str) -> None:
    """Refuse what is no weight; ``whose`` begins the :class:`UsageError`."""
    check_type(str(array.dtype), whose)
    check_finite(array, whose)


def check_type(dtype: str, whose: str) -> None:
    """Refuse a dtype, by its name, that has no real numbers of 16 bits or more."""
    if dtype not in _REAL:
        raise UsageError(
            f"{whose} holds {dtype} and no real numbers of 16 bits or more, so its values mean something else (codes "
            "of a quantization, perhaps); get the weights in floating point."
        )


def check_finite(array: np.ndarray, whose: str) -> None:
    """Refuse values, of a real type, that are NaN or infinite, or are so in float32."""
    if not _is_finite(array):
        raise UsageError(
            f"{whose} has values that are not finite in float32 (NaN, infinite or too large), so all that is computed "
            "with it would be; get other weights, or copy them again."
        )


def _is_finite(array: np.ndarray) -> bool:
    """It takes a small part of the time of reading: no array of the same size is made."""
    import numpy as np

    if array.ndim > 1 and not array.flags.c_contiguous and array.T.flags.c_contiguous:
        array = array.T  # as it lies in memory
    if array.ndim > 1:
        rows = max(1, _PART * len(array) // max(1, array.size))
        return all(_is_finite(array[start : start + rows].reshape(-1)) for start in range(0, len(array), rows))
    if array.dtype.itemsize == 2:  # all bits of the exponent
        exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(np.add.reduce(array, axis=None, dtype=np.float32)):
            return True
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())
