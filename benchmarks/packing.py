"""How full rows are, and how fast they are filled: next-fit, worst-fit over 500 records, best-fit-decreasing.

    python benchmarks/packing.py [--records 50000] [--capacity 2048] [--group 4096] [--repeats 9]

The lengths are log-normal (mean about 298, at most 2048, seeded). "next-fit" is plugin zero-padding; "worst-fit over
500" is what PaddleNLP 3.0.0b4 calls greedy zero padding, written here as its definition says; "best-fit-decreasing" is
plugin greedy-zero-padding over groups of ``--group`` records. Prints rows, padding ratio (the share of all rows'
tokens that is padding), and lengths a second (the best of the repeats).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from sft_data_packing.packers import best_fit_decreasing, next_fit

Packs = list[list[int]]


def log_normal_lengths(records: int, largest: int, seed: int = 0) -> list[int]:
    """Whole numbers from 1 to ``largest``, with a mean of about 298 where ``largest`` is 2048."""
    drawn = np.random.default_rng(seed).lognormal(5.305, 0.9, records)
    return np.clip(drawn, 1, largest).astype(np.int64).tolist()


def worst_fit(lengths: Sequence[int], capacity: int, group: int = 500) -> Packs:
    """Records in their order, each into the emptiest pack of its group that has room for it, else a new one."""
    packs: Packs = []
    for start in range(0, len(lengths), group):
        rooms: list[int] = []
        own: Packs = []
        for number in range(start, min(start + group, len(lengths))):
            emptiest = max(range(len(rooms)), key=rooms.__getitem__, default=-1)
            if emptiest < 0 or rooms[emptiest] < lengths[number]:
                emptiest = len(rooms)
                rooms.append(capacity)
                own.append([])
            rooms[emptiest] -= lengths[number]
            own[emptiest].append(number)
        packs += own
    return packs


def grouped(lengths: Sequence[int], capacity: int, group: int) -> Packs:
    """Best-fit-decreasing over groups of consecutive records."""
    packs: Packs = []
    for start in range(0, len(lengths), group):
        packs += [
            [start + number for number in pack]
            for pack in best_fit_decreasing(lengths[start : start + group], capacity)
        ]
    return packs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--group", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    lengths = log_normal_lengths(given.records, given.capacity)
    total = sum(lengths)
    print(
        f"{len(lengths):,} lengths, mean {total / len(lengths):.0f}, largest {max(lengths)}; rows of {given.capacity}"
    )
    print(f"at least {-(-total // given.capacity):,} rows are needed")
    ways: dict[str, Callable[[], Packs]] = {
        "next-fit": lambda: next_fit(lengths, given.capacity),
        "worst-fit over 500": lambda: worst_fit(lengths, given.capacity),
        f"best-fit-decreasing over {given.group}": lambda: grouped(lengths, given.capacity, given.group),
    }
    print(f"{'':<34} {'rows':>8} {'padding':>9} {'lengths/s':>12}")
    for name, way in ways.items():
        seconds = []
        for _ in range(given.repeats):
            began = time.perf_counter()
            packs = way()
            seconds.append(time.perf_counter() - began)
        padding = 100 * (1 - total / (len(packs) * given.capacity))
        print(f"{name:<34} {len(packs):>8,} {padding:>7.2f} % {len(lengths) / min(seconds):>12,.0f}")


if __name__ == "__main__":
    main()
