"""The packers against plain implementations of their definitions, on random lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sft_data_packing.collators import BestFitCollator, NextFitCollator
from sft_data_packing.packers import best_fit_decreasing, next_fit

Packs = list[list[int]]


def plain_next_fit(lengths: Sequence[int], capacity: int) -> Packs:
    packs: Packs = [[]]
    for number, length in enumerate(lengths):
        if sum(lengths[other] for other in packs[-1]) + length > capacity:
            packs.append([])
        packs[-1].append(number)
    return packs if lengths else []


def plain_best_fit(lengths: Sequence[int], capacity: int) -> Packs:
    """Every pack is looked at for every record; of the fullest with room, the one that was filled last."""
    packs: Packs = []
    filled: list[int] = []
    for clock, number in enumerate(sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))):
        best, best_key = -1, (capacity + 1, 0)
        for index, pack in enumerate(packs):
            room = capacity - sum(lengths[other] for other in pack)
            if room >= lengths[number] and (room, -filled[index]) < best_key:
                best, best_key = index, (room, -filled[index])
        if best < 0:
            best = len(packs)
            packs.append([])
            filled.append(0)
        packs[best].append(number)
        filled[best] = clock
    return packs


def log_normal_lengths(records: int, largest: int = 2048) -> np.ndarray:
    """As benchmarks/packing.py draws them: a mean of about 298."""
    return np.clip(np.random.default_rng(0).lognormal(5.305, 0.9, records), 1, largest).astype(np.int64)


def draws() -> list[tuple[list[int], int]]:
    """Lengths and capacities of all kinds: few and many, short and nearly as long as a row, all the same."""
    generator = np.random.default_rng(5)
    found: list[tuple[list[int], int]] = [([], 4), ([4], 4), ([1], 4), ([4, 4], 4), ([1] * 9, 4), ([3, 1, 3, 1, 2], 4)]
    for _ in range(60):
        capacity = int(generator.integers(1, 200))
        largest = int(generator.integers(1, capacity + 1))
        found.append((generator.integers(1, largest + 1, generator.integers(1, 60)).tolist(), capacity))
    found.append((log_normal_lengths(300).tolist(), 2048))
    return found


@pytest.mark.parametrize(
    ("quick", "plain"),
    [(next_fit, plain_next_fit), (best_fit_decreasing, plain_best_fit)],
    ids=["next-fit", "best-fit"],
)
def test_a_packer_is_its_definition(quick: Callable[..., Packs], plain: Callable[..., Packs]) -> None:
    for lengths, capacity in draws():
        packs = quick(lengths, capacity)
        assert packs == plain(lengths, capacity), (lengths, capacity)
        assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[number] for number in pack) <= capacity for pack in packs)


@pytest.mark.parametrize("packer", [next_fit, best_fit_decreasing])
def test_a_record_longer_than_a_row_is_an_error_and_no_row_is_too_long(packer: Callable[..., Packs]) -> None:
    """The core has truncated and counted such records; one that arrives here is a mistake."""
    with pytest.raises(ValueError, match="A record of 9 tokens does not fit into a row of 8"):
        packer([3, 9, 2], 8)


@pytest.mark.parametrize("capacity", [30, 64, 500])
@pytest.mark.parametrize("group", [1, 7, 50, 10_000])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_record_is_in_one_row_whatever_the_collator(capacity: int, group: int, seed: int | None) -> None:
    lengths = np.random.default_rng(1).integers(1, 31, 333)
    for collator in (NextFitCollator(capacity, 0), BestFitCollator(capacity, 0, group)):
        rows = collator.rows(lengths, None if seed is None else np.random.default_rng(seed))
        assert sorted(number for row in rows for number in row) == list(range(333))
        assert max(int(lengths[list(row)].sum()) for row in rows) <= capacity
        assert all(type(number) is int for row in rows for number in row)


# --- order --------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(2).integers(1, 20, 200)


def test_next_fit_shuffles_records_by_the_seed_and_keeps_the_datas_order_without_one() -> None:
    collator = NextFitCollator(40, 0)
    rows = [collator.rows(LENGTHS, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    in_order = collator.rows(LENGTHS, None)
    assert [number for row in in_order for number in row] == list(range(200))
    assert collator.rows(LENGTHS, None) == in_order
    # Consecutive records of the drawn order share a row.
    order = np.random.default_rng(1).permutation(200).tolist()
    assert [number for row in rows[0] for number in row] == order


def test_groups_keep_the_datas_order_and_the_seed_shuffles_packs() -> None:
    collator = BestFitCollator(40, 0, 50)
    in_order = collator.rows(LENGTHS, None)
    assert collator.rows(LENGTHS, None) == in_order
    groups = [{number // 50 for number in row} for row in in_order]
    assert all(len(group) == 1 for group in groups)
    numbers = [min(group) for group in groups]
    assert numbers == sorted(numbers)
    rows = [collator.rows(LENGTHS, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    for shuffled in rows:
        assert shuffled != in_order
        assert sorted(shuffled) == sorted(in_order)


# --- density ------------------------------------------------------------------------------------------------


def test_padding_on_fifty_thousand_log_normal_lengths() -> None:
    """At most 1 % in groups of 4096, where consecutive records leave a good tenth of each row."""
    lengths = log_normal_lengths(50_000)
    assert lengths.mean() == pytest.approx(298, rel=0.02)

    def padding(rows: Sequence[Sequence[int]]) -> float:
        return 1 - float(lengths.sum()) / (len(rows) * 2048)

    assert padding(BestFitCollator(2048, 0, 4096).rows(lengths, None)) <= 0.01
    assert padding(NextFitCollator(2048, 0).rows(lengths, None)) == pytest.approx(0.14, abs=0.02)
