"""The parallel strategy of a run that has one process: everything is here and whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import paddle

from sft.distributed.parts import Part
from sft.distributed.pieces import Piece
from sft.distributed.place import beside
from sft.distributed.whole import WholeModel
from sft.models.forward import hidden_states
from sft.models.layers import linear_weight
from sft.models.sums import FEW, row_sums
from sft.seams import Batch, Learning, ParallelStrategy, ParameterGroup, ReadsTogether


class SingleProcess(WholeModel):
    """See :class:`sft.ParallelStrategy` for what each member means, and :class:`sft.parallel.ReadsTogether`. A subclass
    may override ``sum`` or ``grad_norm`` alone: ``outcome`` calls them."""

    data_rank = 0
    data_world = 1
    draw_rank = 0
    is_main = True
    is_first = True

    def linear_weight(self, layer: Any) -> Any:
        return linear_weight(layer)

    def connect(self, model: Any) -> None:
        pass

    def share(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        return groups

    def accumulate(self, learning: Learning, batches: Sequence[Batch]) -> Any:
        total = paddle.zeros([], "float64")
        for batch in batches:
            hidden = learning.forward(batch)
            loss = learning.loss(hidden, batch)
            learning.backward(loss)
            total += loss.detach().astype("float64")
        return total

    def outcome(self, loss: Any, values: Sequence[float], stepped: Mapping[str, Any]) -> list[float]:
        if type(self).grad_norm is not SingleProcess.grad_norm:  # gradients are not all here, or not whole
            return [*self.sum([float(loss), *values]), self.grad_norm(stepped)]
        own = loss if isinstance(loss, paddle.Tensor) else paddle.to_tensor(loss, "float64")
        squares = sum_of_squares(stepped.values())
        read, square = paddle.concat([own.astype("float64").reshape([1]), squares.reshape([1])]).tolist()
        return [*self.sum([read, *values]), math.sqrt(square)]

    def grad_norm(self, stepped: Mapping[str, Any]) -> float:
        return math.sqrt(squared_gradients(stepped.values()))

    def updated(self) -> None:
        pass

    def scores(
        self, model: Any, batches: Sequence[Batch], score: Callable[[Any, Batch], Sequence[float]], count: int
    ) -> list[float]:
        found = [score(hidden_states(model, batch), batch) for batch in batches]
        return [sum(each[number] for each in found) for number in range(count)]

    def answering(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        return contextlib.nullcontext(lambda: None)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def largest(self, value: float) -> float:
        return value

    def whole(self, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        return iter(parameters)

    def assembled(self, model: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pieces(self, stepped: Mapping[str, Any]) -> Mapping[str, Piece]:
        return {name: Piece(Part(tuple(p.shape), 0, 0, 1), 0, int(p.size)) for name, p in stepped.items()}

    def own_file(self, stem: str) -> str:
        return stem

    def wait(self) -> None:
        pass


def squared_gradients(parameters: Iterable[Any]) -> float:
    """What :func:`sum_of_squares` computes, read: the device is asked once."""
    return float(sum_of_squares(parameters))


@paddle.no_grad()
def sum_of_squares(parameters: Iterable[Any]) -> Any:
    """The sum of the squares of all gradients of ``parameters``, a float64 scalar beside them that nobody has read yet;
    those without one count as zero.

    The device has one call for each large gradient, and for small ones together as many as LOT values hold. A GPU adds
    its float32 squares in a tree.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return paddle.zeros([], "float64")
    with beside(gradients[0]):
        few, dtype = (FEW, "float64") if gradients[0].place.is_cpu_place() else (SMALL, "float32")
        sums = [_squared(gradient) for gradient in _joined(gradients, few, dtype)]
        return paddle.concat(sums).sum()


def outcome(strategy: ParallelStrategy, loss: Any, values: Sequence[float], stepped: Mapping[str, Any]) -> list[float]:
    """What :meth:`sft.parallel.ReadsTogether.outcome` gives, of any ``strategy``."""
    if isinstance(strategy, ReadsTogether):
        return list(strategy.outcome(loss, values, stepped))
    return [*strategy.sum([loss, *values]), strategy.grad_norm(stepped)]


SMALL = 1 << 18
"""Values of a gradient that a GPU copies in less time than a call takes."""
LOT = 1 << 20
"""Values that are copied together."""


def _joined(gradients: Iterable[Any], few: int, dtype: str) -> Iterator[Any]:
    """``gradients``, those of at most ``few`` values put together, as ``dtype``."""
    small: list[Any] = []
    size = 0
    for gradient in gradients:
        own = math.prod(gradient.shape)
        if own > few:
            yield gradient
            continue
        if size + own > LOT:
            yield paddle.concat(small).astype(dtype)
            small, size = [], 0
        small.append(gradient.reshape([-1]).astype("float32"))
        size += own
    if small:
        yield (small[0] if len(small) == 1 else paddle.concat(small)).astype(dtype)


def _squared(gradient: Any) -> Any:
    """The sum of the squares, float64 [1]."""
    if not gradient.place.is_cpu_place():
        return paddle._C_ops.squared_l2_norm(gradient.astype("float32")).astype("float64")
    if gradient.dtype == paddle.float64:
        return paddle._C_ops.squared_l2_norm(gradient)
    return row_sums(gradient.astype("float32").square().reshape([1, -1])).reshape([1]).astype("float64")
