"""Where processes that share a model exchange tensors while it computes. On one process these do nothing; a parallel
strategy puts objects of its own in their places."""

from __future__ import annotations

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


class Vocabulary:
    """Which columns of the logits this process computes, at ``Head.vocabulary``: here all of them.

    Attributes:
        start: The token of the first column; None: all columns are here.
    """

    start: int | None = None

    def maximum(self, values: Any) -> Any:
        """The element-wise maximum of ``values`` over all processes that have a part of the columns."""
        return values

    def total(self, values: Any) -> Any:
        """The sum of ``values`` over them."""
        return values

    def whole(self, logits: Any) -> Any:
        """The logits of all columns, put together from the columns that each process has."""
        return logits
