"""Where the processes that share a model's layers meet: sums and exchanges that gradients flow through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle.autograd import PyLayer

from sft.parallel import Meeting, Part, Vocabulary
from sft_parallel_4d.internals import alias
from sft_parallel_4d.topology import Axis

SEQUENCE = 1
"""The dimension of [B, S, hidden] that sequence parallelism divides."""


class _Crossing(PyLayer):
    """x → ``there(x)``, and its gradient → ``back(gradient)``: where processes meet, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        return ctx.back(upstream)


def crossing(x: Any, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Any:
    """``there(x)``, whose gradient is ``back`` of that of what it gives."""
    return _Crossing.apply(x, there, back)


def _same(x: Any) -> Any:
    return x


def _alias(x: Any) -> Any:
    """Another tensor over the same memory. Were it ``x`` itself, all else that reads ``x`` would go back through the
    crossing too: the residual stream, where no norm lies between (OLMo 2)."""
    return alias(x)


class BlockMeeting(Meeting):
    """Attention and MLP are computed in parts; with ``sequence``, what lies between them too, while it is ``active``
    (in training and evaluation; answers come token by token). ``first``, ``last``: whether the model's first, its last
    block is among those that compute."""

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self._axis, self.sequence = axis, sequence
        self.active = False
        self.first = self.last = True

    @property
    def _spread(self) -> bool:
        return self.sequence and self.active

    def begin(self, x: Any) -> Any:
        """What all have → each its part of the sequence."""
        return crossing(x, self._own, self._gather) if self._spread and self.first else x

    def enter(self, x: Any) -> Any:
        """What all have (or each a part of) → the same for all, whose gradients add up."""
        if self._spread:
            return crossing(x, self._gather, self._sum_own)
        return crossing(x, _alias, self.sum)

    def leave(self, x: Any) -> Any:
        """Summands → their sum for all (or for each a part)."""
        return crossing(x, self._sum_own, self._gather) if self._spread else self.total(x)

    def end(self, x: Any) -> Any:
        """Parts of the sequence → the whole for all, who compute the same with it."""
        return crossing(x, self._gather, self._own) if self._spread and self.last else x

    def total(self, x: Any) -> Any:
        """Summands → their sum for all, each of whom computes the same with it. They become the sum: what gives them is
        linear, so its backward does not ask for them."""
        return crossing(x, self._axis.sum, _same)

    def total_of_parts(self, x: Any) -> Any:
        """Summands → their sum for all, each of whom computes something else with it: their gradients add up, too."""
        return crossing(x, self.sum, self.sum)

    def sum(self, x: Any) -> Any:
        """The same without gradients, of a copy: a gradient may be another tensor's, too (of both sides of a ``+``)."""
        return self._axis.sum(x.clone())

    def _gather(self, x: Any) -> Any:
        return self._axis.gather(x, SEQUENCE)

    def _own(self, x: Any) -> Any:
        return self._axis.own(x, SEQUENCE)

    def _sum_own(self, x: Any) -> Any:
        return self._axis.sum_own(x, SEQUENCE)


class Columns(Vocabulary):
    """The logits of this process's part of a ``vocabulary`` of so many tokens. Where that does not divide, parts differ
    by one token: none is filled up, so nothing has to be kept from winning."""

    start: int

    def __init__(self, axis: Axis, vocabulary: int) -> None:
        self._axis, self.size = axis, vocabulary
        self.start = vocabulary * axis.rank // axis.size
        self.widest = -(-vocabulary // axis.size)

    def maximum(self, values: Any) -> Any:
        return self._axis.maximum(values.clone())

    def total(self, values: Any) -> Any:
        return self._axis.sum(values.clone())

    def whole(self, logits: Any) -> Any:
        """For answers, which nothing learns from."""
        shape = (*logits.shape[:-1], self.size)
        return self._axis.whole(logits, Part(shape, len(shape) - 1, self._axis.rank, self._axis.size))
