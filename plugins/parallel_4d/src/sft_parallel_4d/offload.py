"""Copies between a device and the host's memory, where offload keeps what a process steps. On a GPU they are begun and
go on while it computes; on a CPU, whose memory is that of the host, they are copies all the same."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle.incubate.tensor.manipulation import async_offload, async_reload, create_async_load


class Resting:
    """A flat tensor in the host's memory: ``tensor`` is it, once :meth:`wait` has come back. Until then its ``source``
    must not change, and is held: paddle would give its memory to others while the copy goes on in another stream."""

    def __init__(
        self, tensor: Any, source: Any = None, pinned: Any = None, wait: Callable[[], None] | None = None
    ) -> None:
        self.tensor, self.pinned, self._source, self._wait = tensor, pinned, source, wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = self._source = None


class Host:
    """The host's memory, as seen from the device on which a run computes."""

    def __init__(self) -> None:
        self._copies = None if paddle.device.get_device() == "cpu" else create_async_load()

    def take(self, tensor: Any) -> Resting:
        """Begin to copy a flat ``tensor`` of the device."""
        if self._copies is None:
            return Resting(tensor.clone())
        pinned, task = async_offload(tensor, self._copies)
        return Resting(_plain(pinned), tensor, pinned, task.cpu_wait)

    def give(self, resting: Resting) -> tuple[Any, Callable[[], None]]:
        """Begin to copy to the device; the tensor there, and what the device waits with before it reads it."""
        if self._copies is None:
            return resting.tensor.clone(), lambda: None
        tensor, task = async_reload(resting.pinned, self._copies)
        return tensor, task.cuda_wait


def _plain(pinned: Any) -> Any:
    """A tensor of the CPU over the memory of one that a GPU reads, which paddle would compute with on the GPU."""
    size = math.prod(pinned.shape) * pinned.element_size()
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pinned.data_ptr()))
    dtype = "uint16" if pinned.dtype == paddle.bfloat16 else str(pinned.dtype).removeprefix("paddle.")
    return paddle.Tensor(memory.view(dtype), place=paddle.CPUPlace(), zero_copy=True)
