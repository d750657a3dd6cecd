"""Where paddle computes: beside a tensor that may lie on the host while the run computes on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import paddle


@contextlib.contextmanager
def beside(tensor: Any) -> Iterator[None]:
    """Within it paddle makes new tensors, and computes, where ``tensor`` is. What mixes tensors of both places,
    or makes one without saying where, would else take everything to the run's device, and leave it there."""
    device = paddle.device.get_device()
    if device == "cpu" or not tensor.place.is_cpu_place():
        yield
        return
    paddle.device.set_device("cpu")
    try:
        yield
    finally:
        paddle.device.set_device(device)
