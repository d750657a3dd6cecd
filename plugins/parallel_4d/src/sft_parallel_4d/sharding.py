"""Sharding (ZeRO, arXiv 1910.02054): each process of an axis keeps a piece of what all of it would keep whole.

A parameter is cut, in memory order, into as many pieces as the axis has processes (the last ones padded with zeros).
Each process steps its own pieces: AdamW goes value by value, so this changes nothing. In stage 1 gradients are summed
to the pieces after the last micro-batch, in stage 2 as soon as backward has each of them, always in float32, and in
stage 3 matrices exist whole only while their block (or the embedding, or lm_head) computes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase

from sft_parallel_4d.topology import Axis


class Shards:
    """The pieces of one process. ``reduce`` adds up the summands of other axes of a whole gradient, in place."""

    def __init__(self, axis: Axis, stage: int, offload: bool, reduce: Callable[[Any, Any], None]) -> None:
        self._axis, self.stage, self._offload, self._reduce = axis, stage, offload, reduce
        self._pieces: dict[int, Any] = {}
        self._whole: list[Any] = []
        """Parameters that are whole now and shall not stay so."""
        self._late: Set[int] = frozenset()
        self.goes_back = False
        """Whether backward is under way."""

    # --- where values are ---

    def takes(self, parameter: Any) -> bool:
        """Whether the parameter itself is kept in pieces: vectors are too small to be worth it."""
        return self.stage == 3 and parameter.ndim > 1

    def put(self, parameter: Any, value: Any) -> None:
        """Keep this process's piece of ``value``, a tensor of the parameter's shape."""
        piece = self._cut(value.astype(parameter.dtype))
        if id(parameter) in self._pieces:
            self._pieces[id(parameter)].set_value(self.resting(piece))
        else:
            self._pieces[id(parameter)] = _parameter(self.resting(piece))

    def has(self, parameter: Any) -> bool:
        """Whether a piece of it is kept here beside it."""
        return id(parameter) in self._pieces

    def fetch(self, parameter: Any) -> Any:
        """The parameter's whole value."""
        if not self.takes(parameter) or parameter._is_initialized():
            return parameter
        flat = self._axis.gather(here(self._pieces[id(parameter)]).detach(), 0)
        return flat[: _size(parameter)].reshape(parameter.shape)

    def piece(self, parameter: Any) -> Any:
        """What is stepped for ``parameter``; made from its value if there is none yet."""
        if id(parameter) not in self._pieces:
            self.put(parameter, parameter)
        return self._pieces[id(parameter)]

    def bounds(self, parameter: Any) -> tuple[int, int]:
        """Which values of ``parameter`` the piece has, without its padding."""
        size, length = _size(parameter), self._length(parameter)
        return min(size, self._axis.rank * length), min(size, (self._axis.rank + 1) * length)

    def _length(self, parameter: Any) -> int:
        return -(-_size(parameter) // self._axis.size)

    def _flat(self, value: Any) -> Any:
        """``value`` flat, with zeros up to a multiple of the axis."""
        flat = value.reshape([-1])
        missing = -flat.shape[0] % self._axis.size
        return paddle.concat([flat, paddle.zeros([missing], dtype=flat.dtype)]) if missing else flat

    @paddle.no_grad()
    def _cut(self, value: Any) -> Any:
        return self._axis.own(self._flat(value), 0).clone()

    def resting(self, tensor: Any) -> Any:
        return tensor.cpu() if self._offload else tensor

    # --- gradients and steps ---

    def watch(self, parameters: Iterable[Any], late: Set[int] = frozenset()) -> None:
        """From stage 2 on: sum each gradient to its piece as soon as backward has it; those of ``late`` (identities),
        which a micro-batch may lead to in one process and not in another, after the last one, as in stage 1."""
        self._late = late
        for parameter in parameters:
            self.piece(parameter)
            if not self.waits(parameter):
                parameter._register_backward_hook(lambda *_, p=parameter: self.collect(p))

    def waits(self, parameter: Any) -> bool:
        """Whether the parameter's gradient stays whole until the last micro-batch is through."""
        return self.stage == 1 or id(parameter) in self._late

    @paddle.no_grad()
    def collect(self, parameter: Any) -> None:
        """Sum the gradient over the axis; the piece has its part of it, and the whole is gone."""
        gradient, piece = parameter.grad, self._pieces[id(parameter)]
        if gradient is None:
            gradient = paddle.zeros(parameter.shape, dtype="float32")
        gradient = gradient.astype("float32")  # 16 bits would lose summands beside their sum
        self._reduce(parameter, gradient)
        part = self.resting(self._axis.sum_own(self._flat(gradient), 0))
        parameter.clear_gradient(False)  # set_to_zero, which paddle ignores by name: it would keep zeros
        if piece.grad is None:
            piece.grad = part
        else:
            piece.grad.add_(part)

    @paddle.no_grad()
    def spread(self, parameters: Iterable[Any]) -> None:
        """After a step: parameters that are whole here get all new values."""
        for parameter in parameters:
            if not self.takes(parameter):
                flat = self._axis.gather(here(self._pieces[id(parameter)]).detach(), 0)
                parameter.set_value(flat[: _size(parameter)].reshape(parameter.shape))

    # --- stage 3: whole while they are needed ---

    def unit(self, layer: Any, again: bool = True) -> None:
        """The matrices of ``layer`` exist while it goes forward, and ``again`` from when its backward begins."""

        def before(layer: Any, _: Any) -> None:
            self.gather(self._matrices(layer))

        def after(layer: Any, inputs: tuple[Any, ...], result: Any) -> None:
            parameters = self._matrices(layer)
            if self.goes_back:  # recomputed: its backward is next
                release_with(inputs[0], parameters)
                return
            self.release(parameters)
            if again and paddle.is_grad_enabled() and not result.stop_gradient:
                result.register_hook(lambda _: take_turn(parameters))
                release_with(inputs[0], parameters)

        def release_with(entering: Any, parameters: list[Any]) -> None:
            """When the gradient of what entered is there, backward is through with the layer."""
            if not entering.stop_gradient:
                entering.register_hook(lambda _: self.release(parameters))

        def take_turn(parameters: list[Any]) -> None:
            self.release()  # the layer behind has its gradients now, and may not have been told yet
            self.gather(parameters)

        layer.register_forward_pre_hook(before)
        layer.register_forward_post_hook(after)

    @contextlib.contextmanager
    def whole(self, layer: Any) -> Iterator[None]:
        """Within it, the matrices of ``layer`` exist."""
        parameters = self._matrices(layer)
        self.gather(parameters)
        yield
        self.release(parameters)

    def _matrices(self, layer: Any) -> list[Any]:
        return [parameter for parameter in layer.parameters() if self.takes(parameter)]

    @paddle.no_grad()
    def gather(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if not parameter._is_initialized():
                self.fetch(parameter)._share_buffer_to(parameter)
                self._whole.append(parameter)

    def release(self, parameters: Iterable[Any] | None = None) -> None:
        """Of ``parameters``, or of all, keep the pieces alone."""
        for parameter in list(self._whole if parameters is None else parameters):
            if parameter._is_initialized():
                parameter._clear_data()
        self._whole = [parameter for parameter in self._whole if parameter._is_initialized()]


def _size(parameter: Any) -> int:
    return math.prod(parameter.shape)


def _parameter(tensor: Any) -> Any:
    parameter = EagerParamBase.from_tensor(tensor)
    parameter.stop_gradient = False
    return parameter


def here(tensor: Any) -> Any:
    """On the device that computes."""
    if tensor.place.is_cpu_place() and paddle.device.get_device() != "cpu":
        return tensor.cuda()
    return tensor
