"""Where processes that share a model exchange tensors while it computes. On one process these do nothing; a parallel
strategy puts objects of its own in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any


class Meeting:
    """What happens to the residual stream where blocks begin and end: at ``Decoder.meeting`` and, of each block, at
    ``DecoderBlock.meeting``. Tensors are [B, S, hidden], or what a strategy makes of them."""

    def begin(self, x: Any) -> Any:
        """Before the first block."""
        return x

    def enter(self, x: Any) -> Any:
        """Before a block's attention, and before its MLP."""
        return x

    def leave(self, x: Any) -> Any:
        """After a block's attention, and after its MLP."""
        return x

    def end(self, x: Any) -> Any:
        """After the last norm."""
        return x


class Exchange:
    """How tokens get to the experts that are chosen for them, at ``SparseMLP.exchange``: here all experts are in this
    process."""

    def through(self, choices: Any, begins: Any, experts: Sequence[Callable[[Any], Any]]) -> Any:
        """Tokens [M, hidden], sorted by the experts that are to take them → what these make of them, in the same order.

        ``begins`` int64 [E + 1]: where the tokens of each of all E experts begin, and where the last ones end. It is on
        the device. ``experts`` are those of this process."""
        return by_expert(choices, [end - begin for begin, end in pairwise(begins.tolist())], experts)


def by_expert(tokens: Any, counts: Sequence[int], experts: Sequence[Callable[[Any], Any]]) -> Any:
    """Tokens [M, hidden], the first ``counts[0]`` of them through the first of the ``experts``, and so on. An expert
    that nothing is for is not called."""
    import paddle

    busy = [number for number, count in enumerate(counts) if count]
    parts = paddle.split(tokens, [counts[number] for number in busy])
    return paddle.concat([experts[number](part) for number, part in zip(busy, parts, strict=True)])


class Vocabulary:
    """Which columns of the logits this process computes, at ``Head.vocabulary``: here all of them.

    Attributes:
        start: The token of the first column; None: all columns are here.
        widest: The most columns that a process has, where they are shared.
        size: The columns of all processes together, where they are shared; 0: they add them up.
    """

    start: int | None = None
    widest: int = 0
    size: int = 0

    def maximum(self, values: Any) -> Any:
        """The element-wise maximum of ``values`` over all processes that have a part of the columns."""
        return values

    def total(self, values: Any) -> Any:
        """The sum of ``values`` over them."""
        return values

    def whole(self, logits: Any) -> Any:
        """The logits of all columns, put together from the columns that each process has."""
        return logits
