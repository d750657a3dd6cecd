"""Gradients of 16-bit parameters, summed over micro-batches in float32: bfloat16 loses what is a 256th of its sum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase


class WideSums:
    """Keeps the gradients of those of ``parameters`` that are not float32 as float32 sums, in their ``grad``.

    paddle adds to the gradient that is there, in its type. Therefore it finds none, and each of its own, in 16 bits, is
    added to the sum and freed as soon as it is there.
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        self._narrow = [parameter for parameter in parameters if parameter.dtype != paddle.float32]
        self._sums: dict[int, Any] = {}
        for parameter in self._narrow:
            parameter._register_backward_hook(lambda *_, parameter=parameter: self._add(parameter))

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward pass of a micro-batch. A gradient that another hook has taken away adds nothing."""
        for parameter in self._narrow:
            if parameter.grad is not None:
                self._sums[id(parameter)] = _taken(parameter)
        yield
        for parameter in self._narrow:
            if id(parameter) in self._sums:
                parameter.grad_ = self._sums.pop(id(parameter))  # to ``grad`` paddle copies, and waits for the device

    @paddle.no_grad()
    def _add(self, parameter: Any) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad.astype("float32")
        parameter.grad = None
        before = self._sums.get(id(parameter))
        self._sums[id(parameter)] = gradient if before is None else before.add_(gradient)


def _taken(parameter: Any) -> Any:
    """The sum that is the parameter's gradient, which it then has no more; not a copy."""
    taken = EagerParamBase(parameter.shape, paddle.float32)
    taken.stop_gradient = True
    parameter.grad.astype("float32")._share_buffer_to(taken)  # what detach() gives would be cleared with the gradient
    parameter.grad = None
    return taken
