"""A model that one process holds alone: nothing is divided, and every parameter is here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class WholeModel:
    """The part of :class:`sft.ParallelStrategy` that reading a model's weights needs, for a process that is alone."""

    def divide(self, model: Any) -> None:
        """Keep all of ``model``."""

    def parameters(self, model: Any) -> Iterable[tuple[str, Any]]:
        """All parameters by structured name, tied ones once."""
        named: Iterable[tuple[str, Any]] = model.named_parameters()
        return named

    def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        """Give a parameter its value: the whole of what ``read`` gives."""
        set_value(parameter, read(tuple(slice(0, length) for length in parameter.shape)))


def set_value(parameter: Any, value: np.ndarray) -> None:
    """Give a parameter the float32 ``value``, rounded to its dtype."""
    import paddle

    value = np.ascontiguousarray(value)  # and what it is a view of is let go
    if parameter.dtype == paddle.bfloat16:
        import ml_dtypes

        value = value.astype(ml_dtypes.bfloat16).view(np.uint16)  # as paddle takes it
    elif parameter.dtype == paddle.float16:
        value = value.astype(np.float16)
    parameter.set_value(value)
