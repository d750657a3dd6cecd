"""What is kept of a record that is longer than ``max_length`` (``truncation``)."""

from __future__ import annotations

import numpy as np


def pieces(length: int, most: int, how: str, kept: int) -> list[np.ndarray]:
    """Which tokens of a record of ``length``, from 0, make the rows that it becomes, each of at most ``most``: int64.

    ``left`` takes from its beginning, but for its first ``kept`` tokens (a BOS), ``right`` from its end; ``drop``
    leaves nothing of it. ``split`` loses no target: the last token of a row, which is only predicted there, is the
    first of the next one, which is only read.
    """
    every = np.arange(length)
    if length <= most:
        return [every]
    if how == "drop":
        return []
    if how == "left":
        kept = min(kept, most)
        return [np.concatenate([every[:kept], every[length - (most - kept) :]])]
    if how == "right":
        return [every[:most]]
    return [every[start : start + most] for start in range(0, length - 1, most - 1)]
