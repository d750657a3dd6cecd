"""Arrays of a checkpoint that its adapter's file holds already: they are read from there, and not written again.

An adapter plugin writes a parameter as it is, transposed (PEFT has matrices the other way round), or with more before
or after it along a dimension. Arrays that are in its file bit by bit are not kept a second time; all others are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

Place = list[Any]
"""A tensor's name in the adapter's file, whether it is transposed there, the array's shape, and whether it stands at
the end of the tensor rather than at its beginning; JSON."""


def find_places(adapter: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """Where ``adapter`` holds each of ``arrays``, with the same dtype and bits; those that it does not hold are left
    out."""
    by_corner: dict[tuple[bool, str, bytes], list[str]] = {}
    for key, tensor in adapter.items():
        for at_end in (False, True):
            by_corner.setdefault((at_end, *_corner(tensor, at_end)), []).append(key)
    of_own_name = _of_own_name(adapter, arrays)

    def candidates(name: str, array: np.ndarray) -> Iterator[Place]:
        for at_end in (False, True):
            alike = by_corner.get((at_end, *_corner(array, at_end)), [])
            for key in (*of_own_name.get(name, ()), *alike):  # in the first steps thousands are alike: all zeros
                for transposed in (False, True):
                    yield [key, transposed, list(array.shape), at_end]

    places: dict[str, Place] = {}
    for name, array in arrays.items():
        for place in candidates(name, array):
            if _has_same_bits(take(adapter, place), array):
                places[name] = place
                break
    return places


def _of_own_name(adapter: Iterable[str], names: Container[str]) -> dict[str, list[str]]:
    """For each of ``names`` those tensors of ``adapter`` whose names have it in them, as in ``prefix.NAME.weight``."""
    found: dict[str, list[str]] = {}
    for key in adapter:
        parts = key.split(".")
        for start, end in combinations(range(len(parts) + 1), 2):
            name = ".".join(parts[start:end])
            if name in names:
                found.setdefault(name, []).append(key)
    return found


def take(adapter: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    """What is at ``place`` of ``adapter``. Raises KeyError where there is no such tensor."""
    key, transposed, shape, at_end = place
    tensor = adapter[key].T if transposed else adapter[key]
    if tensor.ndim != len(shape):
        return tensor
    starts = [max(0, whole - size) if at_end else 0 for whole, size in zip(tensor.shape, shape, strict=True)]
    return tensor[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


def _corner(array: np.ndarray, at_end: bool) -> tuple[str, bytes]:
    """Its dtype and first value, or its last: its transpose has the same, and either with more on the other side."""
    corner = slice(-1, None) if at_end else slice(1)
    return str(array.dtype), array[(corner,) * array.ndim].tobytes()


def _has_same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits, others = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return bool(np.array_equal(bits, others))
