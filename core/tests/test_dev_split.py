"""Dev data that is taken out of training data by a hash of the record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.data.dev_split import Side, bound_of_number, bound_of_share, hash_of
from sft.data.sources import Record


def records(numbers: range | list[int]) -> list[Record]:
    return [Record({"src": f"q{number}", "tgt": "a"}, Path("x"), 1) for number in numbers]


def dev_of(bound: int, found: list[Record]) -> set[str]:
    return {record.value["src"] for record in found if Side(bound, True).holds(record)}


def test_the_hash_is_that_of_the_content() -> None:
    """As json.dumps of Python and hashlib say, whatever the order of the names is."""
    text = '{"src":"é","tgt":["1"]}'.encode()
    expected = int(hashlib.sha256(text).hexdigest()[:16], 16)
    assert hash_of({"tgt": ["1"], "src": "é"}) == expected == hash_of(json.loads(text))


def test_a_share_is_taken_and_stays_when_records_are_added() -> None:
    bound, few, many = bound_of_share(0.05), records(range(2000)), records(range(20_000))
    dev = dev_of(bound, many)
    assert abs(len(dev) - 1000) < 5 * math.sqrt(20_000 * 0.05 * 0.95)
    assert dev_of(bound, few) == dev & {record.value["src"] for record in few}
    for record in few:
        assert Side(bound, True).holds(record) is not Side(bound, False).holds(record)


def test_a_number_is_taken_of_different_records() -> None:
    found = records([*range(100), *range(50)])
    bound = bound_of_number(10, found)
    smallest = sorted(range(100), key=lambda number: hash_of(found[number].value))[:10]
    assert dev_of(bound, found) == {f"q{number}" for number in smallest}
    more = records(range(200))
    assert dev_of(bound_of_number(10, more), more) & {f"q{number}" for number in range(100)} <= dev_of(bound, found)
    assert bound_of_number(100, found) == 0
    assert bound_of_number(99, found) > 0


@pytest.mark.parametrize(
    ("wanted", "lazy"),
    [(0.3, True), (4, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.3, False), (4, True)))],
)
def test_a_run_trains_on_the_one_side_and_measures_the_other(
    train: Callable[..., Any], tmp_path: Path, lazy: bool, wanted: float
) -> None:
    values = [{"src": f"type#{number % 20}", "tgt": "A coat" + " for you" * (number % 20 % 6)} for number in range(30)]
    (tmp_path / "train.json").write_text("".join(json.dumps(value) + "\n" for value in values))
    summary = train(dataset_name_or_path=str(tmp_path / "train.json"), dev_split=wanted, lazy=lazy, max_steps=4)
    hashes = sorted({hash_of(value) for value in values})
    bound = wanted * 2**64 if wanted < 1 else hashes[int(wanted)]
    dev = [value for value in values if hash_of(value) < bound]
    assert 0 < len(dev) < 30
    assert summary.data["dev"]["records"] == len(dev)
    passes = summary.data["train"]["records"] / (30 - len(dev))
    assert passes.is_integer()
    assert (passes == 1) or lazy


def test_data_that_has_dev_data_keeps_it(train: Callable[..., Any], dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"dev_split takes dev data out of training data, and .* has dev data of"):
        train(dev_split=0.1, max_steps=1)
    (tmp_path / "one.json").write_text('{"src": "a", "tgt": "b"}\n' * 3)
    with pytest.raises(sft.UsageError, match="dev_split 1 would take all different records of one"):
        train(dataset_name_or_path=str(tmp_path / "one.json"), dev_split=1, max_steps=1)
    for share, what in (
        (0.05, "takes none .*; give a larger share, or a"),
        (0.99, "leaves none .* to train on; give a"),
    ):
        with pytest.raises(sft.UsageError, match=f"dev_split {share} {what}"):
            train(dataset_name_or_path=str(tmp_path / "one.json"), dev_split=share, max_steps=1)
    with pytest.raises(sft.UsageError, match=r"dev_split: expected a share below 1 or a whole number of records, got"):
        train(dev_split=1.5, max_steps=1)
