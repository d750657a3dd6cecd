"""What native code asks of a tensor before it reads its memory, and where it writes. While an answer is computed these
are asked thousands of times a second."""

from __future__ import annotations

from typing import Any

import paddle

FLOAT32, BFLOAT16 = paddle.float32, paddle.bfloat16  # paddle looks for its types anew each time
_CPU = paddle.CPUPlace()


def fits(*tensors: Any) -> bool:
    """Whether the native code takes them: float32, in memory that it can read."""
    for tensor in tensors:  # noqa: SIM110 - a generator takes twice as long
        if tensor.dtype != FLOAT32 or not tensor.place.is_cpu_place():
            return False
    return True


def learning(*tensors: Any) -> bool:
    """Whether any of them is to have a gradient."""
    return paddle.is_grad_enabled() and not all(tensor.stop_gradient for tensor in tensors)


def dense(x: Any) -> Any:
    """``x`` with its values one after the other."""
    return x if x.is_contiguous() else x.contiguous()


def empty(shape: list[int]) -> Any:
    """Float32, on the CPU, of any values. (``paddle.empty`` takes three times as long.)"""
    return paddle._C_ops.empty(shape, FLOAT32, _CPU)
