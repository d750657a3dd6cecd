"""Arrays of a checkpoint that its adapter's file holds already: they are read from there, and not written again.

An adapter plugin writes a parameter as it is, transposed (PEFT has matrices the other way round), or with more after it
along a dimension. Arrays that are in its file bit by bit are not kept a second time; all others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Place = list[Any]
"""A tensor's name in the adapter's file, whether it is transposed there, and the array's shape; JSON."""


def find_places(adapter: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """Where ``adapter`` holds each of ``arrays``, with the same dtype and bits; those that it does not hold are left
    out."""
    by_first_value: dict[tuple[str, bytes], list[str]] = {}
    for key, tensor in adapter.items():
        by_first_value.setdefault(_first_value(tensor), []).append(key)
    places: dict[str, Place] = {}
    for name, array in arrays.items():
        candidates = by_first_value.get(_first_value(array), [])
        for key in sorted(candidates, key=lambda key: name not in key):  # that of its own name first
            for transposed in (False, True):
                place = [key, transposed, list(array.shape)]
                if name not in places and _has_same_bits(take(adapter, place), array):
                    places[name] = place
            if name in places:
                break
    return places


def take(adapter: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    """What is at ``place`` of ``adapter``. Raises KeyError where there is no such tensor."""
    key, transposed, shape = place
    tensor = adapter[key].T if transposed else adapter[key]
    return tensor[tuple(map(slice, shape))] if tensor.ndim == len(shape) else tensor


def _first_value(array: np.ndarray) -> tuple[str, bytes]:
    """The same for an array, its transpose, and either with more after it."""
    return str(array.dtype), array[(slice(1),) * array.ndim].tobytes()


def _has_same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits, others = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return bool(np.array_equal(bits, others))
