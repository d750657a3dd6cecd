"""How the checks of a GPU measure: types, tensors, and distances."""

from __future__ import annotations

from typing import Any

import numpy as np

import sft
from sft.precision import Precision

ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
NARROW = ("bfloat16", "float16")


def dtypes(on_gpu: bool) -> tuple[str, ...]:
    return ("float32", *NARROW) if on_gpu else ("float32",)


def apart(one: Any, other: Any) -> float:
    """The distance of two arrays or tensors, relative to the size of the second."""
    one, other = (
        np.asarray(x.astype("float32").numpy() if hasattr(x, "numpy") else x, np.float64) for x in (one, other)
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def tensor(paddle: Any, array: np.ndarray, dtype: str = "float32") -> Any:
    made = paddle.to_tensor(np.asarray(array, np.float32)).astype(dtype).detach()
    made.stop_gradient = False
    return made


def own_kernels() -> Any:
    """What the core computes a model's pieces with on this device."""
    return sft.own_kernels(Precision())
