"""The forward pass of training and evaluation: a batch of rows, whose documents do not see each other."""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.errors import UsageError
from sft.models.architecture import ModelShape
from sft.models.kernels import PLAIN, Kernels
from sft.models.turning import tables

if TYPE_CHECKING:
    from sft.seams import AttentionBackend, Batch


def hidden_states(model: Any, batch: Batch, embedded: Any | None = None) -> Any:
    """The last hidden states [B, S, hidden] of a batch, through the model's attention backend.

    ``embedded`` [B, S, hidden] goes into the first block instead of the embedding of the batch's tokens. Raises
    :class:`UsageError` where rows hold several records and the attention backend cannot keep them apart.
    """
    if batch.packed and not getattr(model.attention, "packed", False):
        raise UsageError(
            f"A row holds several records, and attention backend {type(model.attention).__name__} would let them see "
            "each other; leave the backend or the packing out."
        )
    if embedded is None:
        embedded = model.embed(paddle.to_tensor(batch.input_ids))
    return model.hidden_states(embedded, RowReading(model.architecture, batch, model.attention, model.kernels))


class RowReading:
    """A batch of rows, whose documents do not see each other, through an attention backend.

    A window is a document that ends early: query rows from min(end of the document, j + window) on do not see key j.
    """

    def __init__(
        self, architecture: ModelShape, batch: Batch, backend: AttentionBackend, kernels: Kernels = PLAIN
    ) -> None:
        self._architecture, self._backend, self._kernels = architecture, backend, kernels
        self._batch, self.longest = batch, int(batch.position_ids.max()) + 1
        lengths = lengths_of(batch)
        self._tables = [tables(rotary, batch.position_ids, lengths) for rotary in architecture.rotaries]
        described = batch.packed or getattr(backend, "describes_padding", False)
        longest = max(chain.from_iterable(batch.lengths), default=0)  # of whole rows, whatever is here of them
        # A window that no document fills is none.
        self._windows = [
            None if block.window is None or block.window >= longest else block.window for block in architecture.blocks
        ]
        ends = batch.startend_row_indices
        places = np.arange(ends.shape[2], dtype=np.int32).reshape(1, 1, -1, 1)
        self._masks: dict[int | None, Any] = {}
        for window in dict.fromkeys(self._windows):
            if window is not None:
                self._masks[window] = backend.mask(np.minimum(ends, places + np.int32(window)))
            else:  # causal attention says it all where a row is one document
                self._masks[window] = backend.mask(ends if described else None)

    @cached_property
    def positions(self) -> Any:
        """See :class:`Reading`. Made when it is asked for: the decoder's own blocks have tables instead, and a GPU may
        be waited for when an array is copied there."""
        return paddle.to_tensor(self._batch.position_ids)

    def turn(self, x: Any, rotary: int) -> Any:
        return self._kernels.rotate(x, self._architecture.rotaries[rotary], *self._tables[rotary])

    def attend(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        mask = self._masks[self._windows[layer]]
        cap = self._architecture.attention_cap
        return self._backend.attend(query, key, value, mask, **({} if cap is None else {"cap": cap}))


def lengths_of(batch: Batch) -> np.ndarray:
    """int64 [B, S]: of how many tokens the document is that each token stands in; padding stands alone."""
    found = np.ones((len(batch.lengths), batch.width), np.int64)
    each = np.fromiter(chain.from_iterable(batch.lengths), np.int64)
    tokens = np.fromiter(map(sum, batch.lengths), np.int64)
    found[np.arange(batch.width) < tokens[:, None]] = np.repeat(each, each)
    return batch.here(found)
