"""Which tensors travel together: a collective for each small one would cost more than its transfer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

Pairs = Iterable[tuple[Any, Any]]
"""Keys, each with a tensor."""
BUCKET = 1 << 27
"""Bytes of a buffer in which small tensors travel: all gradients of a usual adapter, and two copies are affordable."""
SMALL = 1 << 23
"""Bytes of a tensor that travels with others. A larger one takes so long that a collective of its own costs nothing,
and copying it to a buffer does."""


def size_in_bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * int(tensor.element_size())


def is_small(tensor: Any) -> bool:
    """Whether ``tensor`` travels with others."""
    return size_in_bytes(tensor) <= SMALL


def lots(pairs: Pairs, ranks: int, grows: int = 1) -> Iterator[tuple[list[Any], list[Any]]]:
    """Keys and tensors that travel together: of one type, and as many as BUCKET holds when each has grown ``grows``
    times. Each pair is asked for when it is due; of one rank, where nothing travels, all come one by one."""
    waiting: dict[Any, tuple[list[Any], list[Any]]] = {}
    sizes: dict[Any, int] = {}
    for key, tensor in pairs:
        dtype, own = tensor.dtype, size_in_bytes(tensor) * grows
        if ranks == 1 or own > SMALL:
            yield [key], [tensor]
            continue
        if dtype in waiting and sizes[dtype] + own > BUCKET:
            yield waiting.pop(dtype)
        if dtype not in waiting:
            waiting[dtype], sizes[dtype] = ([], []), 0
        keys, tensors = waiting[dtype]
        keys.append(key)
        tensors.append(tensor)
        sizes[dtype] += own
        del tensor
    yield from waiting.values()
