"""`rows.json`: which records are in a row, and what of them is learned. That the rows are those of the data is tried in
test_run_report.py."""

from __future__ import annotations

import numpy as np

from sft.data.encoded import Counts, Encoded
from sft.seams import Example
from sft.training.first_rows import _records, _spans


def test_rows_of_pairs_name_their_record_twice() -> None:
    """A record that is two documents (``beside``), and a collator that makes other documents than it was given."""
    data = Encoded(
        np.arange(12, dtype=np.int32), np.ones(12, bool), np.array([0, 3, 6, 12]), Counts(), beside=np.array([1])
    )
    assert _records(data, (0, 1), 3) == [1, 1, 2]
    assert _records(data, (0, 1), 2) == [None, None]


def test_an_example_without_a_target_has_one_span() -> None:
    example = Example(np.arange(5), np.array([-100, -100, 4, 5, -100]))
    assert _spans(example.labels != -100) == [2, 2, 1]
    assert _spans(np.ones(3, bool)) == [0, 3]
    assert _spans(np.zeros(3, bool)) == [3]
