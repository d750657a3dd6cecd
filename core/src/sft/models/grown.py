"""A vocabulary that has grown (`new_tokens`): rows of the embedding, and of the head, for tokens that the model's files
do not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft.distributed.whole import Stored

if TYPE_CHECKING:
    import numpy as np

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Growth:
    """What has become of a vocabulary of ``before`` rows: it has ``rows``, and those of ``ids`` are new. New rows, also
    those that are no token's, begin as the mean of all rows that the files have: where transformers'
    ``resize_token_embeddings`` begins them, but for its noise of 1e-9 of their covariance."""

    before: int
    rows: int
    ids: tuple[int, ...]

    def of(self, values: np.ndarray, axis: int) -> np.ndarray:
        """A matrix of the files, whose rows lie along ``axis``, with the rows that it has now."""
        import numpy as np

        mean = values.mean(axis=axis, keepdims=True, dtype=np.float64).astype(values.dtype)
        more = np.repeat(mean, self.rows - self.before, axis=axis)
        grown = np.concatenate([values, more], axis=axis)
        within = [number for number in self.ids if number < self.before]
        if within:
            grown[(slice(None),) * axis + (within,)] = mean
        return grown


def rows_for(before: int, tokens: int) -> int:
    """How many rows a vocabulary of ``before`` gets for so many ``tokens``: no fewer than it has, and a multiple of the
    power of two up to 64 that divides ``before``, so that it divides among processes as it did."""
    step = next(step for step in (64, 32, 16, 8, 4, 2, 1) if before % step == 0)
    return max(before, -(-tokens // step) * step)


class GrownTensor(Stored):
    """A matrix of the files as it is with ``growth``, in Paddle's layout, its rows along ``axis``. It is read whole."""

    def __init__(self, stored: Stored, shape: Sequence[int], growth: Growth, axis: int) -> None:
        self._stored, self._shape, self._growth, self._axis = stored, tuple(shape), growth, axis
        self._grown: np.ndarray | None = None

    def __call__(self, where: tuple[slice, ...]) -> np.ndarray:
        if self._grown is None:
            self._grown = self._growth.of(self._stored(tuple(slice(0, length) for length in self._shape)), self._axis)
        return self._grown[where]

    def onto(self, target: np.ndarray) -> None:
        from sft.arrays import copy_onto

        copy_onto(target, self(tuple(slice(0, length) for length in target.shape)))
