"""FlashMask's column-wise masks (arXiv 2410.01359): which query rows do not see key j.

``startend_row_indices`` int32 [B, 1 or H, S, n]. Causal, n = 1: rows i ≥ c0; n = 2: c0 ≤ i < c1; and rows i < j.
Not causal, n = 2: rows i ≥ c0 or i < c1; n = 4: c0 ≤ i < c1 or c2 ≤ i < c3.
"""

from __future__ import annotations

import numpy as np

from sft import UsageError


def column_masks(indices: np.ndarray, causal: bool = True) -> list[ColumnMask]:
    """The mask of each row of a batch, of indices int32 [B, 1 or H, S, n]."""
    return [ColumnMask(one, causal) for one in indices]


class ColumnMask:
    """The two intervals of masked query rows of each key, for one row of a batch; arrays int32 [heads, S]."""

    def __init__(self, indices: np.ndarray, causal: bool) -> None:
        """``indices`` [1 or H, S, n] of one batch row."""
        columns = indices.shape[-1]
        length = indices.shape[-2]
        end, zero = np.full(indices.shape[:2], length, np.int32), np.zeros(indices.shape[:2], np.int32)
        column = [indices[..., k] for k in range(columns)]
        if causal and columns in (1, 2):
            self.lower = (column[0], column[1] if columns == 2 else end)
            self.upper = (zero, np.broadcast_to(np.arange(length, dtype=np.int32), indices.shape[:2]))
        elif not causal and columns in (2, 4):
            self.lower = (column[0], column[1] if columns == 4 else end)
            self.upper = (column[2], column[3]) if columns == 4 else (zero, column[1])
        else:
            kind = "causal" if causal else "non-causal"
            raise UsageError(
                f"FlashMask has no {kind} masks of {columns} columns; causal ones have 1 or 2, others 2 or 4."
            )
        self.length = length

    def tile(self, rows: slice) -> tuple[slice, np.ndarray | None]:
        """For query rows ``rows``: the range of keys that any of them may see, and what they do not see in it.

        The second is bool [heads, rows, keys], or None if everything in the range is seen. O(S) work beside it.
        """
        hidden = np.zeros(self.lower[0].shape, bool)
        touched = np.zeros(self.lower[0].shape, bool)
        for start, stop in (self.lower, self.upper):
            first, last = np.maximum(start, rows.start), np.minimum(stop, rows.stop)
            touched |= first < last
            hidden |= (start <= rows.start) & (stop >= rows.stop)
        seen = np.flatnonzero(~hidden.all(axis=0))
        if not len(seen):
            return slice(0, 0), None
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        if not touched[:, keys].any():
            return keys, None
        query = np.arange(rows.start, rows.stop, dtype=np.int32)[None, :, None]
        masked = np.zeros((hidden.shape[0], query.shape[1], keys.stop - keys.start), bool)
        for start, stop in (self.lower, self.upper):
            masked |= (query >= start[:, None, keys]) & (query < stop[:, None, keys])
        return keys, masked
