"""What native code asks of a tensor before it reads its memory."""

from __future__ import annotations

from typing import Any

import paddle


def fits(*tensors: Any) -> bool:
    """Whether the native code takes them: float32, in memory that it can read."""
    return all(tensor.dtype == paddle.float32 and tensor.place.is_cpu_place() for tensor in tensors)


def learning(*tensors: Any) -> bool:
    """Whether any of them is to have a gradient."""
    return paddle.is_grad_enabled() and not all(tensor.stop_gradient for tensor in tensors)


def dense(x: Any) -> Any:
    """``x`` with its values one after the other."""
    return x if x.is_contiguous() else x.contiguous()
