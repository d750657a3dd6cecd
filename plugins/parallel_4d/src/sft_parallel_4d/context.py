"""Context parallelism: the tokens of each row, divided among processes that all have the model's weights.

Of c processes, process r has every c-th token, from token r on, and computes all but attention with these alone:
whatever documents a row holds, each process has as many tokens, and as many targets but for one. Attention meets: each
process sends its tokens' queries, keys and values of H / c heads to each other one, and then has those heads of the
whole rows, in order (Ulysses, arXiv 2309.14509). So the run's attention backend computes what it computes on one
process, whatever masks, windows and caps there are, and docs/decisions/0067-context-parallelism.md says what else was
weighed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft import Batch
from sft_parallel_4d.meeting import crossing
from sft_parallel_4d.tensor import padded
from sft_parallel_4d.topology import Axis

if TYPE_CHECKING:
    from sft import AttentionBackend


class ContextParallel:
    """Divides rows along ``axis``, into shares of a multiple of ``parts`` tokens, which tensor ranks can divide."""

    def __init__(self, axis: Axis, parts: int) -> None:
        self._axis, self._parts = axis, parts
        self.attention: RowsAttention | None = None

    def connect(self, model: Any) -> None:
        """Let attention meet, when the model has the run's backend."""
        self.attention = model.attention = RowsAttention(model.attention, self._axis)

    def share(self, batch: Batch) -> Batch:
        """This process's tokens of a batch."""
        missing = -batch.input_ids.shape[1] % (self._axis.size * self._parts)
        batch = padded(batch, missing) if missing else batch
        columns = np.arange(self._axis.rank, batch.input_ids.shape[1], self._axis.size)
        return replace(
            batch,
            input_ids=batch.input_ids[:, columns],
            labels=batch.labels[:, columns],
            weights=None if batch.weights is None else batch.weights[:, columns],
            position_ids=batch.position_ids[:, columns],
            columns=columns,
        )


class RowsAttention:
    """An :class:`sft.AttentionBackend` of which each process has a share of the tokens, over one of whole rows. While
    it is not ``active``, all have all of them: answers, and what a plugin computes by itself."""

    def __init__(self, whole: AttentionBackend, axis: Axis) -> None:
        self._whole, self._axis = whole, axis
        self.active = False
        self.packed = getattr(whole, "packed", False)
        self.caps = getattr(whole, "caps", False)

    @property
    def describes_padding(self) -> bool:
        return getattr(self._whole, "describes_padding", False)

    @property
    def kernels(self) -> Any:
        """Those of the backend, if it has any: an AttributeError where it has none, as there."""
        return self._whole.kernels  # type: ignore[attr-defined]

    @kernels.setter
    def kernels(self, kernels: Any) -> None:
        self._whole.kernels = kernels  # type: ignore[attr-defined]

    def mask(self, ends: np.ndarray | None) -> Any:
        return self._whole.mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None = None) -> Any:
        more: dict[str, Any] = {} if cap is None else {"cap": cap}
        if not self.active:
            return self._whole.attend(query, key, value, mask, **more)
        query, key, value = self._heads(query, key, value)
        return self._tokens(self._whole.attend(query, key, value, mask, **more))

    def _heads(self, query: Any, key: Any, value: Any) -> list[Any]:
        """Of each [B, S / c, heads, D], of this process's tokens: [B, S, heads / c, D], of its heads."""
        ranks = self._axis.size
        rows, tokens, heads, size = key.shape
        # Where key heads are fewer than processes, several of these look at one.
        copies = math.lcm(heads, ranks) // heads
        if copies > 1:
            key, value = (
                one.unsqueeze(3).expand([rows, tokens, heads, copies, size]).reshape([rows, tokens, -1, size])
                for one in (key, value)
            )
        # All in one exchange: [B, S / c, rank, heads of that rank, D].
        parts = [one.reshape([rows, tokens, ranks, -1, size]) for one in (query, key, value)]
        counts = [part.shape[3] for part in parts]
        whole = self._swapped(paddle.concat(parts, axis=3)).reshape([rows, tokens * ranks, -1, size])
        return list(paddle.split(whole, counts, axis=2))

    def _tokens(self, out: Any) -> Any:
        """The inverse, of one tensor."""
        (rows, length, heads, size), ranks = out.shape, self._axis.size
        found = self._swapped(out.reshape([rows, length // ranks, ranks, heads, size]))
        return found.reshape([rows, length // ranks, ranks * heads, size])

    def _swapped(self, x: Any) -> Any:
        """[B, S / c, c, heads, D], of which the third dimension says for whom each part is → the same, where it says
        from whom each comes. It is its own inverse, and so its own gradient."""
        return crossing(x, self._swap, self._swap)

    def _swap(self, x: Any) -> Any:
        return self._axis.swap(x.transpose([2, 0, 1, 3, 4])).transpose([1, 2, 0, 3, 4])
