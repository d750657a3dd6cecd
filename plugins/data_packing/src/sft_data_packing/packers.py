"""Which records share a row of ``capacity`` tokens: next-fit, and best-fit-decreasing within groups."""

from __future__ import annotations

from collections.abc import Sequence


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of each pack: consecutive records for as long as they fit, as PaddleNLP's zero padding has it."""
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
    fullest pack that fits is one shift and one bit trick away, whatever the number of packs.
    """
    packs: list[list[int]] = []
    free: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    mask = 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[number]
        fits = mask >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            pack = free[room].pop()
            if not free[room]:
                mask ^= 1 << room
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(number)
        free[room - length].append(pack)
        mask |= 1 << (room - length)
    return packs
