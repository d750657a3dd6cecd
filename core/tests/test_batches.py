"""Batches: how rows are laid out and padded, and which rows belong to which step of a run."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from sft import Example
from sft.data.batches import PaddedCollator, Schedule, assemble, make_batches
from sft.data.encoded import Encoded
from sft.models.forward import lengths_of
from sft.settings.arguments import TrainingArguments

PAD = 99


def example(*ids: int) -> Example:
    """Every token of it is learned: position i predicts ids[i] + 1."""
    return Example(np.array(ids, np.int64), np.array(ids, np.int64) + 1)


# --- rows ---------------------------------------------------------------------------------------------------


def test_one_document_a_row_is_padded_on_the_right() -> None:
    batch = assemble([[example(1, 2, 3)], [example(4)]], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch.labels.tolist() == [[2, 3, 4], [5, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.startend_row_indices[:, 0, :, 0].tolist() == [[3, 3, 3], [1, 2, 3]]
    assert batch.lengths == ((3,), (1,))
    assert not batch.packed
    assert (batch.tokens, batch.padding_tokens, batch.target_tokens) == (4, 2, 4)


def test_documents_of_3_and_2_in_a_row_of_7() -> None:
    batch = assemble([[example(1, 2, 3), example(4, 5)], [example(6, 7, 8, 9, 10, 11, 12)]], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, PAD, PAD], [6, 7, 8, 9, 10, 11, 12]]
    assert batch.labels.tolist() == [[2, 3, 4, 5, 6, -100, -100], [7, 8, 9, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.startend_row_indices.shape == (2, 1, 7, 1)
    assert batch.startend_row_indices[0, 0, :, 0].tolist() == [3, 3, 3, 5, 5, 6, 7]
    assert batch.startend_row_indices[1, 0, :, 0].tolist() == [7] * 7
    assert batch.lengths == ((3, 2), (7,))
    assert batch.packed
    assert (batch.tokens, batch.padding_tokens) == (12, 2)


def test_the_indices_describe_attention_within_each_document() -> None:
    lengths = [[2, 3, 1], [4], [1, 1]]
    rows = [[example(*range(n)) for n in row] for row in lengths]
    batch = assemble(rows, PAD)
    width = batch.input_ids.shape[1]
    for number, row in enumerate(lengths):
        ends = batch.startend_row_indices[number, 0, :, 0]
        query, key = np.mgrid[:width, :width]
        seen = (key <= query) & (query < ends[key])
        # Documents by number; every padding token is one of its own.
        document = np.concatenate([np.repeat(np.arange(len(row)), row), 100 + np.arange(width - sum(row))])
        assert (seen == ((key <= query) & (document[query] == document[key]))).all()
        assert seen.any(axis=1).all()


def test_types() -> None:
    batch = assemble([[example(1), example(2)]], PAD)
    assert {a.dtype for a in (batch.input_ids, batch.labels, batch.position_ids)} == {np.dtype(np.int64)}
    assert batch.startend_row_indices.dtype == np.int32


def test_a_pad_token_that_is_also_an_answers_end_stays_a_label() -> None:
    batch = assemble([[Example(np.array([1, 2]), np.array([-100, PAD]))], [example(1, 2, 3)]], PAD)
    assert batch.labels[0].tolist() == [-100, PAD, -100]
    assert batch.target_tokens == 4


# --- the collator of a run without plugins ------------------------------------------------------------------


def test_a_record_a_row() -> None:
    collator = PaddedCollator(PAD)
    assert collator.rows(np.array([5, 3, 9]), None) == [(0,), (1,), (2,)]
    shuffled = collator.rows(np.arange(1, 51), np.random.default_rng(0))
    assert sorted(shuffled) == [(index,) for index in range(50)]
    assert shuffled != sorted(shuffled)


def data(records: int, length: int = 4) -> Encoded:
    """Records of ``length`` tokens each, all of them learned."""
    total = records * length
    return Encoded(
        np.arange(total, dtype=np.int32), np.ones(total, bool), np.arange(0, total + 1, length, dtype=np.int64)
    )


def test_batches_of_rows() -> None:
    batches = make_batches(data(5), PaddedCollator(PAD), [(4,), (0,), (2,)], 2)
    assert [batch.input_ids.tolist() for batch in batches] == [[[16, 17, 18], [0, 1, 2]], [[8, 9, 10]]]
    assert batches[0].labels.tolist() == [[17, 18, 19], [1, 2, 3]]
    assert make_batches(data(5), PaddedCollator(PAD), [], 2) == []


@pytest.mark.parametrize("rows", [[(4, 0, 3), (2,), (1, 5)], [(3,)], [(0, 1, 2, 3, 4, 5)]])
def test_a_collator_gets_the_examples_that_the_records_are(rows: list[tuple[int, ...]]) -> None:
    """What it takes from them one by one makes the same batch as what :func:`assemble` takes at once."""
    lengths = [4, 2, 7, 3, 5, 2]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(100, 100 + offsets[-1], dtype=np.int32)
    held = Encoded(ids, ids % 3 > 0, offsets)
    seen: list[list[list[Example]]] = []

    class Looking(PaddedCollator):
        def batch(self, rows: Sequence[Sequence[Example]]) -> Any:
            seen.append([list(row) for row in rows])
            assert [len(row) for row in rows] == [len(row) for row in rows[:]]
            return super().batch(rows)

    (batch,) = make_batches(held, Looking(PAD), rows, len(rows))
    for examples, numbers in zip(seen[0], rows, strict=True):
        for found, number in zip(examples, numbers, strict=True):
            own = list(range(offsets[number], offsets[number + 1]))
            assert found.input_ids.tolist() == [100 + token for token in own[:-1]]
            assert found.labels.tolist() == [100 + n if (100 + n) % 3 else -100 for n in own[1:]]
            assert found.input_ids.dtype == found.labels.dtype == np.int64
    again = assemble(seen[0], PAD)
    for name in ("input_ids", "labels", "position_ids", "startend_row_indices"):
        one, other = getattr(batch, name), getattr(again, name)
        assert one.dtype == other.dtype, name
        assert one.tolist() == other.tolist(), name
    assert batch.lengths == again.lengths == tuple(tuple(lengths[n] - 1 for n in row) for row in rows)


def test_weights_travel_with_their_labels() -> None:
    """Of records by number and of examples alike; a label of weight 0 is no target, and a weight without a label 0."""
    held = data(3)
    assert make_batches(held, PaddedCollator(PAD), [(0, 1)], 1)[0].weights is None
    held.weights = np.where(held.trained, np.arange(len(held.ids)) / 4, 0).astype(np.float32)
    (batch,) = make_batches(held, PaddedCollator(PAD), [(2, 0), (1,)], 2)
    assert batch.weights is not None
    assert batch.weights.dtype == np.float32
    of_each = [held.weights[start + 1 : stop] for start, stop in pairwise(held.offsets)]
    expected = [np.concatenate([of_each[2], of_each[0]]), of_each[1]]
    for found, weights in zip(batch.weights, expected, strict=True):
        assert found.tolist() == [*weights, *[0] * (batch.weights.shape[1] - len(weights))]
    assert batch.target_weight == sum(float(weights.sum()) for weights in expected)
    again = assemble([[held[2], held[0]], [held[1]]], PAD)
    assert again.weights.tolist() == batch.weights.tolist()
    assert again.labels.tolist() == batch.labels.tolist()

    ids, labels = np.array([1, 2, 3]), np.array([-100, 7, 8])
    given = [[Example(ids, labels, np.array([5, 0, 0.5])), Example(ids, labels)]]
    mixed = assemble(given, PAD)
    assert mixed.labels.tolist() == [[-100, -100, 8, -100, 7, 8]]
    assert mixed.weights.tolist() == [[0, 0, 0.5, 0, 1, 1]]
    assert (mixed.target_tokens, mixed.target_weight) == (3, 2.5)
    assert given[0][0].labels.tolist() == [-100, 7, 8]


def test_a_batch_of_some_columns() -> None:
    """Where processes share rows: what of them is here, and lengths of whole documents."""
    documents = [[Example(np.arange(1, n + 1), np.arange(n)) for n in row] for row in ((3, 2), (1,))]
    whole, columns = assemble(documents, PAD), np.array([0, 2, 4])
    assert whole.width == whole.input_ids.shape[1]
    assert whole.here(whole.labels) is whole.labels
    share = dataclasses.replace(
        whole, input_ids=whole.input_ids[:, columns], labels=whole.labels[:, columns], columns=columns
    )
    assert (whole.tokens, whole.padding_tokens) == (6, 4)
    assert (share.tokens, share.padding_tokens, share.target_tokens) == (4, 2, 4)
    assert share.width == whole.width
    np.testing.assert_array_equal(share.here(whole.labels), share.labels)
    assert lengths_of(share).tolist() == [[3, 3, 2], [1, 1, 1]]
    assert share.packed


def test_no_call_of_python_is_made_for_each_record_of_a_row() -> None:
    """A row of a thousand records takes as many as one of ten; its numbers themselves are read one by one, in C."""

    def calls(records: int) -> int:
        held, row, count = data(1000), [tuple(range(records))], 0

        def see(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += 1

        gc.collect()
        gc.disable()  # what it calls is none of this
        sys.setprofile(see)
        try:
            batch = make_batches(held, PaddedCollator(PAD), row, 1)[0]
            lengths_of(batch)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    calls(10)  # with what happens once in a process
    assert calls(10) == calls(1000) > 0


# --- the schedule -------------------------------------------------------------------------------------------


def schedule(
    records: int = 10, rows_per_step: int = 4, epochs: float = 1.0, max_steps: int = -1, seed: int = 42
) -> Any:
    return Schedule(data(records), PaddedCollator(PAD), seed, rows_per_step, epochs, max_steps)


def steps(plan: Schedule, number: int, start: int = 0) -> list[tuple[int, float, list[tuple[int, ...]]]]:
    return [(step.number, step.epoch, step.rows) for step in islice(plan.iterate(start), number)]


def order(plan: Schedule, epoch: int, per_epoch: int = 3) -> list[int]:
    """Record numbers of an epoch in the order in which they are trained."""
    found = steps(plan, per_epoch, start=epoch * per_epoch)
    return [record for _, _, rows in found for row in rows for record in row]


def test_steps_are_numbered_from_1_and_the_last_one_of_an_epoch_may_be_smaller() -> None:
    found = steps(schedule(), 6)
    assert [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [len(rows) for _, _, rows in found] == [4, 4, 2, 4, 4, 2]
    assert [epoch for _, epoch, _ in found] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [step.number for step in islice(schedule().iterate(), 6) if step.ends_pass] == [3, 6]


def test_every_record_is_read_once_an_epoch_in_another_order() -> None:
    orders = [order(schedule(), epoch) for epoch in range(4)]
    for found in orders:
        assert sorted(found) == list(range(10))
    assert len({tuple(found) for found in orders}) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    assert order(schedule(), 1) == order(schedule(epochs=9, max_steps=2), 1)
    assert order(schedule(seed=1), 0) != order(schedule(seed=2), 0)
    # Independent of what else draws random numbers.
    first = order(schedule(), 0)
    np.random.default_rng(42).random(100)
    assert order(schedule(), 0) == first


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 7])
def test_going_on_after_a_step_gives_what_would_have_followed(start: int) -> None:
    assert steps(schedule(), 9 - start, start) == steps(schedule(), 9)[start:]
    if start:
        place = list(islice(schedule().iterate(), start))[-1].place
        again = [(step.number, step.epoch, step.rows) for step in islice(schedule().iterate(start, place), 9 - start)]
        assert again == steps(schedule(), 9)[start:]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [
        (1, -1, 3),
        (3, -1, 9),
        (0.5, -1, 2),
        (0.01, -1, 1),
        (1.34, -1, 5),
        (2.5, -1, 8),
        (3, 4, 4),
        (1, 100, 100),
        (0.01, 1, 1),
    ],
)
def test_total_steps(epochs: float, max_steps: int, expected: int) -> None:
    # 10 records, 4 rows a step: 3 steps an epoch.
    assert schedule(epochs=epochs, max_steps=max_steps).total_steps == expected


@pytest.mark.parametrize(("epochs", "expected"), [(1.1, 11), (2.2, 22), (0.3, 3), (2.9, 29), (1.11, 12)])
def test_fractions_of_epochs_are_not_off_by_a_step(epochs: float, expected: int) -> None:
    assert schedule(records=10, rows_per_step=1, epochs=epochs).total_steps == expected


class TwosOrThrees:
    """Two or three records a row, as the epoch's random numbers say: epochs differ in their number of rows."""

    def rows(self, lengths: np.ndarray, rng: np.random.Generator | None) -> list[tuple[int, ...]]:
        assert rng is not None
        order = rng.permutation(len(lengths))
        size = 2 + int(rng.integers(2))
        return [tuple(map(int, order[start : start + size])) for start in range(0, len(order), size)]

    def batch(self, rows: Sequence[Sequence[Example]]) -> Any:
        return assemble(rows, PAD)


def test_total_steps_where_epochs_differ_in_rows() -> None:
    plan = Schedule(data(12), TwosOrThrees(), 7, 1, 6, -1)
    per_epoch: dict[int, int] = {}
    for step in islice(plan.iterate(), plan.total_steps):
        number = int(np.ceil(step.epoch))
        per_epoch[number] = per_epoch.get(number, 0) + 1
    assert set(per_epoch.values()) == {4, 6}
    assert sorted(per_epoch) == [1, 2, 3, 4, 5, 6]
    assert step.epoch == 6


def plan_of(world: int, **training: Any) -> Schedule:
    """The schedule that a run of ``world`` processes makes."""
    return Schedule.of(TrainingArguments(**training), data(50), PaddedCollator(PAD), world)


def test_a_step_reads_the_same_rows_however_many_processes_share_it() -> None:
    plans = [
        plan_of(1, per_device_train_batch_size=8, gradient_accumulation_steps=1),
        plan_of(1, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        plan_of(2, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        plan_of(4, per_device_train_batch_size=2, gradient_accumulation_steps=1),
    ]
    expected = steps(plans[0], 10)
    assert [len(rows) for _, _, rows in expected] == [8, 8, 8, 8, 8, 8, 2, 8, 8, 8]
    for plan in plans[1:]:
        assert steps(plan, 10) == expected
        assert plan.total_steps == plans[0].total_steps == 21
