"""Sharding (ZeRO, arXiv 1910.02054): each process of an axis keeps a piece of what all of it would keep whole.

A parameter is cut, in memory order, into as many pieces as the axis has processes (the last ones padded with zeros).
Each process steps its own pieces: AdamW goes value by value, so this changes nothing. In stage 1 gradients are summed
to the pieces after the last micro-batch, in stage 2 as soon as backward has each of them, or of small ones as many as a
buffer holds, always in float32. In stage 3 matrices exist whole only while their block (or the embedding, or lm_head)
computes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import paddle
from paddle.base.framework import EagerParamBase

from sft_parallel_4d.lots import BUCKET, Pairs, is_small, size_in_bytes
from sft_parallel_4d.topology import Axis


class Shards:
    """The pieces of one process. ``reduce`` adds up the summands of other axes of whole gradients: it takes and gives
    parameters, each with its flat gradient."""

    def __init__(self, axis: Axis, stage: int, offload: bool, reduce: Callable[[Pairs], Pairs]) -> None:
        self._axis, self.stage, self._offload, self._reduce = axis, stage, offload, reduce
        self._pieces: dict[int, Any] = {}
        self._whole: list[Any] = []
        """Parameters that are whole now and shall not stay so."""
        self._held: set[int] = set()
        """By identity, those that must not go yet (:meth:`whole`)."""
        self._late: Set[int] = frozenset()
        self.goes_back = False
        """Whether backward is under way."""
        self._waiting: list[tuple[Any, Any]] = []
        """Parameters, and small gradients of theirs on their way to pieces."""
        self._waiting_bytes = 0

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
        return _shaped(self._axis.gather(here(self._pieces[id(parameter)]).detach(), 0), parameter)

    def _fetched(self, parameters: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each of ``parameters`` with its whole value, put together from pieces."""
        pairs = ((parameter, here(self._pieces[id(parameter)]).detach()) for parameter in parameters)
        for parameter, flat in self._axis.gathers(pairs):
            yield parameter, _shaped(flat, parameter)

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

    def _padded(self, flat: Any) -> Any:
        """``flat`` with zeros up to a multiple of the axis."""
        missing = -flat.shape[0] % self._axis.size
        return paddle.concat([flat, paddle.zeros([missing], dtype=flat.dtype)]) if missing else flat

    @paddle.no_grad()
    def _cut(self, value: Any) -> Any:
        return self._axis.own(self._padded(value.reshape([-1])), 0).clone()

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
                parameter._register_backward_hook(lambda *_, p=parameter: self._take(p))

    def waits(self, parameter: Any) -> bool:
        """Whether the parameter's gradient stays whole until the last micro-batch is through."""
        return self.stage == 1 or id(parameter) in self._late

    @paddle.no_grad()
    def _take(self, parameter: Any) -> None:
        """Sum the gradient that backward has just made, with others if it is small."""
        gradient = _taken(parameter)
        if not is_small(gradient):
            self._collect([(parameter, gradient)])
            return
        if self._waiting_bytes + size_in_bytes(gradient) > BUCKET:
            self.flush()
        self._waiting.append((parameter, gradient))
        self._waiting_bytes += size_in_bytes(gradient)

    @paddle.no_grad()
    def flush(self) -> None:
        """Sum what waits for more, after the backward pass of a micro-batch."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._collect(_each(waiting))

    @paddle.no_grad()
    def collect(self, parameters: Iterable[Any]) -> None:
        """Sum the gradients of ``parameters`` over the axis; their pieces have their parts, and the whole is gone."""
        self._collect((parameter, _taken(parameter)) for parameter in parameters)

    def _collect(self, gradients: Pairs) -> None:
        flat = ((parameter, self._padded(gradient)) for parameter, gradient in self._reduce(gradients))
        for parameter, part in self._axis.sums_own(flat):
            piece, own = self._pieces[id(parameter)], self.resting(part)
            if piece.grad is None:
                piece.grad_ = own  # to ``grad`` paddle copies, and waits for the device
            else:
                piece.grad.add_(own)

    @paddle.no_grad()
    def spread(self, parameters: Iterable[Any]) -> None:
        """After a step: parameters that are whole here get all new values."""
        for parameter, value in self._fetched(p for p in parameters if not self.takes(p)):
            paddle.assign(value, parameter)

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
        """Within it, the matrices of ``layer`` exist, also where another forward pass goes through a layer of them."""
        parameters = self._matrices(layer)
        self.gather(parameters)
        held = {id(parameter) for parameter in parameters} - self._held
        self._held |= held
        try:
            yield
        finally:
            self._held -= held
            self.release(parameters)

    def _matrices(self, layer: Any) -> list[Any]:
        return [parameter for parameter in layer.parameters() if self.takes(parameter)]

    @paddle.no_grad()
    def gather(self, parameters: Iterable[Any]) -> None:
        missing = [parameter for parameter in parameters if not parameter._is_initialized()]
        for parameter, value in self._fetched(missing):
            value._share_buffer_to(parameter)
            self._whole.append(parameter)

    def release(self, parameters: Iterable[Any] | None = None) -> None:
        """Of ``parameters``, or of all, keep the pieces alone."""
        for parameter in list(self._whole if parameters is None else parameters):
            if parameter._is_initialized() and id(parameter) not in self._held:
                parameter._clear_data()
        self._whole = [parameter for parameter in self._whole if parameter._is_initialized()]


def _size(parameter: Any) -> int:
    return math.prod(parameter.shape)


def _shaped(flat: Any, parameter: Any) -> Any:
    """The values of ``parameter`` in its shape, without padding."""
    return flat[: _size(parameter)].reshape(parameter.shape)


def _taken(parameter: Any) -> Any:
    """The parameter's gradient, flat and in float32, since 16 bits would lose summands beside their sum; the parameter
    has none then."""
    gradient = parameter.grad
    if gradient is None:
        return paddle.zeros([_size(parameter)], dtype="float32")
    # Another tensor over the same memory, whatever the shape: the gradient itself is empty after the next line.
    flat = paddle._C_ops.reshape(gradient, [-1]).astype("float32")
    parameter.clear_gradient(False)  # set_to_zero, which paddle ignores by name: it would keep zeros
    return flat


def _each(pairs: list[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """``pairs``, of which the list lets go one by one."""
    pairs.reverse()
    while pairs:
        yield pairs.pop()


def _parameter(tensor: Any) -> Any:
    parameter = EagerParamBase.from_tensor(tensor)
    parameter.stop_gradient = False
    return parameter


def here(tensor: Any) -> Any:
    """On the device that computes."""
    if tensor.place.is_cpu_place() and paddle.device.get_device() != "cpu":
        return tensor.cuda()
    return tensor
