"""Plugins ``flash-attention`` and ``flashmask``: attention without an [S, S] tensor."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import sft
from sft_attn_flashmask import gpu
from sft_attn_flashmask.masks import ColumnMask, column_masks

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from sft import AttentionBackend, Run


class _Mask:
    """The ends of a batch's documents as paddle's kernels want them, and as the blockwise implementation does."""

    def __init__(self, ends: np.ndarray) -> None:
        self._ends = ends

    @cached_property
    def indices(self) -> Any:
        """int32 [B, 1, S, 1] on the device."""
        import paddle

        return paddle.to_tensor(self._ends)

    @cached_property
    def columns(self) -> list[ColumnMask]:
        """Of each row of the batch."""
        return column_masks(self._ends)


class _Backend:
    """16-bit tensors on a GPU go to paddle's kernels, everything else to the blockwise implementation."""

    packed = True
    caps = True

    def __init__(self, describes_padding: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self.describes_padding = describes_padding
        self._version = gpu.Version(say)

    def mask(self, ends: np.ndarray | None) -> _Mask | None:
        return None if ends is None else _Mask(ends)

    def attend(self, query: Any, key: Any, value: Any, mask: _Mask | None, cap: float | None = None) -> Any:
        from sft_attn_flashmask.blockwise import attention

        # paddle's kernels know no cap; float16 here is bfloat16 too.
        if cap is not None or not (query.place.is_gpu_place() and str(query.dtype).endswith("float16")):
            return attention(query, key, value, None if mask is None else mask.columns, cap=cap)
        with self._version.chosen(query):
            return gpu.compute(query, key, value, None if mask is None else mask.indices)


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

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        outline.attention_in_blocks = True


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

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: Any) -> None:
        outline.attention_in_blocks = True
