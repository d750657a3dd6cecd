"""The attention that a model has where no plugin provides another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import paddle

from sft.models.kernels import PLAIN

if TYPE_CHECKING:
    import numpy as np


class DefaultAttention:
    """The attention of the model's kernels (:meth:`sft.Kernels.attention`), which computes everything."""

    packed = True
    caps = True
    kernels = PLAIN

    @property
    def describes_padding(self) -> bool:
        return str(paddle.get_device()) == "cpu"

    def mask(self, ends: np.ndarray | None) -> Any:
        """What the kernels make of ``ends``, int32 [B, 1, S, 1] or None."""
        return self.kernels.mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None = None) -> Any:
        """That of the kernels, scores capped by ``cap``: query [B, S, H, D]; key, value [B, S, K, D] → [B, S, H, D]."""
        return self.kernels.attention(query, key, value, mask, cap)
