"""The forward pass of answers: prompts, and then token by token, over the keys and values of what came before."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from sft.models.architecture import ModelShape
from sft.models.kept_keys import KeptKeys, Seen
from sft.models.kernels import PLAIN, Kernels
from sft.models.turning import tables


class CachedReading:
    """Prompts, padded on the left to one length, and their answers: each call of the decoder takes the tokens that are
    new, and sees the keys and values of those before, which are kept here.

    ``padding`` int64 [B] is how many tokens on the left of each row are none.
    """

    positions: Any
    longest: int

    def __init__(self, architecture: ModelShape, padding: np.ndarray, kernels: Kernels = PLAIN) -> None:
        self._architecture, self._padding, self._kernels = architecture, padding, kernels
        self._kept: list[KeptKeys | None] = [None] * len(architecture.blocks)
        self._seen = 0
        self._tables: list[Any] = []
        self._news: dict[int | None, Seen] = {}
        self._whole: dict[int | None, Any] = {}

    def expect(self, count: int) -> None:
        """The next call brings ``count`` tokens a row."""
        first, self._seen = self._seen, self._seen + count
        places = np.arange(first, self._seen)
        positions = np.maximum(places[None] - self._padding[:, None], 0)
        self.positions, self.longest = paddle.to_tensor(positions), int(positions.max()) + 1
        lengths = np.broadcast_to((self._seen - self._padding)[:, None], positions.shape)
        self._tables = [tables(rotary, positions, lengths) for rotary in self._architecture.rotaries]
        windows = {block.window for block in self._architecture.blocks}
        self._whole = {window: self._kernels.mask(self._ends(window)) for window in windows} if not first else {}
        self._news = {window: Seen(self._padding, self._seen, count, window) for window in windows} if first else {}

    def _ends(self, window: int | None) -> np.ndarray:
        """Of prompts: int32 [B, 1, S, 1], as :class:`sft.Batch` has them. A token of padding sees itself: its softmax
        must not be empty, and nobody reads what comes of it."""
        places = np.arange(self._seen)
        ends = np.where(places < self._padding[:, None], places + 1, self._seen)
        ends = ends if window is None else np.minimum(ends, places + window)
        return ends.astype(np.int32)[:, None, :, None]

    @property
    def is_outgrown(self) -> bool:
        """Whether one more token makes a document so long that its rotary embedding is another one (longrope): then
        the keys that are kept stand for nothing, and all tokens have to be read again."""
        limits = {rotary.limit for rotary in self._architecture.rotaries if rotary.kind == "longrope"}
        return any((self._seen - self._padding == limit).any() for limit in limits)

    def turn(self, x: Any, rotary: int) -> Any:
        return self._kernels.rotate(x, self._architecture.rotaries[rotary], *self._tables[rotary])

    def attend(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        window, cap = self._architecture.blocks[layer].window, self._architecture.attention_cap
        kept = self._kept[layer]
        if kept is not None:
            return kept.attend(query, key, value, self._news[window], cap)
        self._kept[layer] = self._kernels.kept_keys(key, value)
        return self._kernels.attention(query, key, value, self._whole[window], cap)
