"""Plugins ``flash-attention`` and ``flashmask``: attention without an [S, S] tensor."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import sft
from sft_attn_flashmask import gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from sft import AttentionBackend, Run
    from sft_attn_flashmask.masks import ColumnMask


class _Mask:
    """The ends of a batch's documents, in the form that each implementation wants, which is made when it is asked."""

    def __init__(self, ends: np.ndarray | None, kernels: sft.Kernels) -> None:
        self._ends, self._kernels = ends, kernels

    @cached_property
    def indices(self) -> Any | None:
        """paddle's: int32 [B, 1, S, 1] on the device."""
        import paddle

        return None if self._ends is None else paddle.to_tensor(self._ends)

    @cached_property
    def columns(self) -> list[ColumnMask] | None:
        """The blockwise implementation's: of each row of the batch."""
        from sft_attn_flashmask.masks import column_masks

        return None if self._ends is None else column_masks(self._ends)

    @cached_property
    def own(self) -> Any:
        """That of the model's kernels."""
        return self._kernels.mask(self._ends)


class _Backend:
    """16-bit tensors on a GPU go to paddle's kernels, everything else to those of the model where they skip what is
    masked, or else to the blockwise implementation."""

    packed = True
    caps = True

    def __init__(self, describes_padding: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self._describes_padding = describes_padding
        self._version = gpu.Version(say)
        self.kernels = sft.PLAIN

    @property
    def describes_padding(self) -> bool:
        return self._describes_padding or not gpu.on_gpu()

    def mask(self, ends: np.ndarray | None) -> _Mask:
        return _Mask(ends, self.kernels)

    def attend(self, query: Any, key: Any, value: Any, mask: _Mask, cap: float | None = None) -> Any:
        # paddle's kernels know no cap; float16 here is bfloat16 too.
        if cap is not None or not (query.place.is_gpu_place() and str(query.dtype).endswith("float16")):
            if self.kernels.skips_masked:
                return self.kernels.attention(query, key, value, mask.own, cap)
            from sft_attn_flashmask.blockwise import attention

            return attention(query, key, value, mask.columns, cap=cap)
        indices = mask.indices
        with self._version.chosen(query, indices is not None):
            return gpu.compute(query, key, value, indices)


def _backend(plugin: sft.Plugin, run: Run, config: Any, describes_padding: bool) -> AttentionBackend | None:
    """None on a GPU whose kernels cannot compute it: there the blockwise implementation would be slow."""
    if run is None:
        return _Backend(describes_padding)
    if gpu.on_gpu():
        why = gpu.missing(run.precision.dtype, getattr(config, "head_size", None), config.attention_cap)
        if why is not None:
            run.say(f"{plugin.name}: {why}; attention is the core's own")
            return None
    return _Backend(describes_padding, run.say)


class FlashAttention(sft.Plugin):
    """Attention in blocks: memory linear in the row (arXiv 2205.14135). Only rows of several documents get masks."""

    name = "flash-attention"
    api_version = 1
    summary = "Attention in blocks, memory linear in the length of a row (FlashAttention)."
    reference = "arXiv 2205.14135"

    @sft.hookimpl
    def sft_attention_backend(self, run: Run, config: Any) -> AttentionBackend | None:
        return _backend(self, run, config, describes_padding=False)


class FlashMask(sft.Plugin):
    """Attention in blocks that skips what column-wise masks hide (arXiv 2410.01359)."""

    name = "flashmask"
    api_version = 1
    summary = "Attention in blocks that skips what is masked: documents of a packed row, padding (FlashMask)."
    reference = "arXiv 2410.01359"
    supersedes = ("flash-attention",)

    @sft.hookimpl
    def sft_attention_backend(self, run: Run, config: Any) -> AttentionBackend | None:
        return _backend(self, run, config, describes_padding=True)
