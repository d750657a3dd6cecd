"""What native code asks of a tensor before it reads its memory, and where it writes. While an answer is computed these
are asked thousands of times a second."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
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


_LINE = 16  # float32 values in a line of the cache
_MOST_ROOMS = 2  # forward has one such tensor at a time, and backward another
_rooms: list[np.ndarray] = []  # memory that no tensor has at the moment


def passing(shape: list[int]) -> Any:
    """Float32, on the CPU, of any values, for what is soon dropped: its memory goes from one such tensor to the next.
    Between tensors that stay until backward its place would become a hole that nothing fits, a few MiB in each block
    of a model. Where they are many at a time, since what is computed with them keeps them, the rest is given back."""
    count = math.prod(shape)
    place = next((n for n, room in enumerate(_rooms) if room.size >= count), None)
    if place is None:
        _rooms.clear()  # too small, and so they will be
        room = np.empty(count + _LINE, np.float32)
        room = room[-(room.ctypes.data // 4) % _LINE :]
    else:
        room = _rooms.pop(place)
    values = room[:count].reshape(shape)
    weakref.finalize(values, _vacate, room).atexit = False
    return paddle.from_dlpack(values)


def _vacate(room: np.ndarray) -> None:
    if len(_rooms) < _MOST_ROOMS:
        _rooms.append(room)
