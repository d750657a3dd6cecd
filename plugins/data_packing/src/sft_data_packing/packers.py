"""Which records share a row of ``capacity`` tokens: next-fit, and best-fit-decreasing within groups.

No record may be longer than a row: the core has truncated and counted those that were (``max_length``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of each pack: consecutive records for as long as they fit, as PaddleNLP's zero padding has it."""
    _check(lengths, capacity)
    packs: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if not packs or length > room:
            packs.append([])
            room = capacity
        packs[-1].append(number)
        room -= length
    return packs


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of each pack: the longest record first, each into the fullest pack that has room for it.

    The packs with r tokens left stand in ``free[r]``, and bit r of ``mask`` says whether there are any, so the
    fullest pack that fits is one shift and one bit trick away, whatever the number of packs. Of packs that are
    equally full the one that was filled last is taken.
    """
    _check(lengths, capacity)
    packs: list[list[int]] = []
    free: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    bits = [1 << room for room in range(capacity + 1)]
    mask = 0
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for number in order:
        length = lengths[number]
        room = length
        waiting = free[room]
        if not waiting:  # no pack that it fills exactly
            fits = mask >> length
            if fits:
                room += (fits & -fits).bit_length() - 1
                waiting = free[room]
        if waiting:
            pack = waiting.pop()
            if not waiting:
                mask ^= bits[room]
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(number)
        left = room - length
        waiting = free[left]
        if not waiting:
            mask |= bits[left]
        waiting.append(pack)
    return packs


def _check(lengths: Sequence[int], capacity: int) -> None:
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"A record of {max(lengths)} tokens does not fit into a row of {capacity}.")
