"""A model that one process holds alone: nothing is divided, and every parameter is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sft.arrays import array_of, copy_onto, dtype_of


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
        if isinstance(read, Stored):
            _set(parameter, read.onto)
        else:
            set_value(parameter, read(tuple(slice(0, length) for length in parameter.shape)))


class Stored(ABC):
    """A tensor that is read from a file, in Paddle's layout: any part of it, or all at once to where it belongs."""

    @abstractmethod
    def __call__(self, where: tuple[slice, ...]) -> np.ndarray:
        """What is at ``where`` of it, in the file's float type."""

    @abstractmethod
    def onto(self, target: np.ndarray) -> None:
        """Give ``target``, of its shape, its values, rounded to the dtype of that."""


def set_value(parameter: Any, value: np.ndarray) -> None:
    """Give a parameter the ``value``, of its shape and any float type (bfloat16 as ``ml_dtypes`` has it), rounded to
    its dtype."""
    _set(parameter, lambda target: copy_onto(target, value))


def _set(parameter: Any, write: Callable[[np.ndarray], None]) -> None:
    """Let ``write`` write the values of ``parameter``."""
    import paddle

    here = paddle.device.get_device() == "cpu"
    if here and not parameter._is_initialized():
        tensor = paddle.empty(parameter.shape, parameter.dtype)
        write(array_of(tensor))
        tensor._share_buffer_to(parameter)  # the only copy
    elif here and parameter.place.is_cpu_place() and parameter.is_contiguous():
        write(array_of(parameter))
    else:
        values = np.empty(parameter.shape, dtype_of(parameter))
        write(values)
        # as paddle takes it, whose numpy has no bfloat16
        parameter.set_value(values.view(np.uint16) if parameter.dtype == paddle.bfloat16 else values)
