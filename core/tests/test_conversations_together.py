"""Records that are several conversations: they stay together from the file to the row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_plugins import toy

import sft
from sft.conversations import Conversation, Turn
from sft.data.batches import Rows, assemble
from sft.data.encoded import Encoded, joined
from sft.data.encoding import encode, whole_length
from sft.data.tokenizer import Tokenizer
from sft.data_report.gather import Wanted, data_report
from sft.testing import write_data

Train = Callable[..., sft.Summary]


def record_of(number: int) -> dict[str, Any]:
    question = "which coat " + "please " * (number % 4) + "?"
    return {"ask": question, "answers": ["a warm one" + " for you" * (number % 3), "none", f"coat {number}"]}


def read(self: sft.Plugin, record: dict[str, Any]) -> Any:
    if "answers" not in record:
        return None
    every = [
        Conversation([Turn("user", record["ask"]), Turn("assistant", answer, trains=True)])
        for answer in record["answers"]
    ]
    return Conversation(every[0], beside=every[1:])


Threes = toy("threes", sft_record_format=read)


def together(*answers: str, ask: str = "a b c", earlier: int = 0) -> Conversation:
    before = [turn for n in range(earlier) for turn in (Turn("user", f"old {n} " * 3), Turn("assistant", f"yes {n}"))]
    every = [Conversation([*before, Turn("user", ask), Turn("assistant", a, trains=True)]) for a in answers]
    return Conversation(every[0], beside=every[1:])


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / "llama-tied-gqa")


def texts(data: Encoded, tokenizer: Tokenizer) -> list[str]:
    """Each document, with what is learned of it in brackets."""
    found = []
    for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        learned = [int(i) for i, t in zip(data.ids[start:stop], data.trained[start:stop], strict=True) if t]
        found.append(tokenizer.decode(learned, skip_special_tokens=True).strip())
    return found


def test_they_are_documents_of_one_record(tokenizer: Tokenizer) -> None:
    single = Conversation([Turn("user", "d"), Turn("assistant", "e f", trains=True)])
    data = encode([together("x", "y z"), single, together("u", "v", "w")], tokenizer, 256, 256)
    assert (len(data), data.beside.tolist(), data.edges.tolist()) == (3, [1, 4, 5], [0, 2, 3, 6])
    assert (data.counts.records, data.counts.records_dropped) == (3, 0)
    assert texts(data, tokenizer) == ["x", "y z", "e f", "u", "v", "w"]
    each = np.diff(data.offsets) - 1
    assert data.lengths.tolist() == [each[:2].sum(), each[2], each[3:].sum()]
    assert data.counts.tokens == each.sum()
    assert data.longest == each.max()
    both = joined([data, data])
    assert (len(both), both.beside.tolist()) == (6, [1, 4, 5, 7, 10, 11])
    assert joined([data]).fingerprint() == data.fingerprint()
    alone = encode([one for t in (together("x", "y z"),) for one in t.together], tokenizer, 256, 256)
    assert alone.fingerprint() != encode([together("x", "y z")], tokenizer, 256, 256).fingerprint()


def test_a_row_holds_all_of_a_record(tokenizer: Tokenizer) -> None:
    single = Conversation([Turn("user", "d"), Turn("assistant", "e f", trains=True)])
    data = encode([together("x", "y z"), single, together("u", "v", "w")], tokenizer, 256, 256)
    batch = assemble(Rows.taken(data, [(2,), (0, 1)]), pad_id=0)
    each = (np.diff(data.offsets) - 1).tolist()
    assert batch.lengths == (tuple(each[3:]), (each[0], each[1], each[2]))
    assert batch.packed
    for row, documents in enumerate([[3, 4, 5], [0, 1, 2]]):
        own = np.concatenate([data[number].input_ids for number in documents])
        assert batch.input_ids[row, : len(own)].tolist() == own.tolist()
        assert batch.position_ids[row, each[documents[0]]] == 0


def test_they_lose_as_much_from_their_beginnings(tokenizer: Tokenizer) -> None:
    """The longest decides; the prompts stay equal."""
    pair = together("yes", "no " * 12, earlier=3)
    whole = [len(tokenizer.encode("".join(tokenizer.template.texts(one)))) for one in pair.together]
    data = encode([pair], tokenizer, 256, max(whole) - 5)
    assert data.counts.turns_dropped == 4
    prompts = [
        data.ids[a:b][~data.trained[a:b]][:6].tolist() for a, b in zip(data.offsets, data.offsets[1:], strict=False)
    ]
    assert prompts[0] == prompts[1]
    assert texts(data, tokenizer) == ["yes", ("no " * 12).strip()]
    alone = encode([pair.together[0]], tokenizer, 256, max(whole) - 5)
    assert len(alone.ids) > np.diff(data.offsets)[0]
    cut = encode([together("yes", "no " * 12, ask="a b c " * 8)], tokenizer, 12, 256)
    assert (cut.counts.prompts_truncated, cut.counts.records) == (1, 1)


@pytest.mark.parametrize("truncation", ["drop", "left"])
def test_a_record_of_which_one_is_lost_is_dropped(tokenizer: Tokenizer, truncation: str) -> None:
    given = [together("yes", "no " * 40), together("a", "b")]
    data = encode(given, tokenizer, 256, 24, truncation=truncation)
    if truncation == "drop":
        assert (len(data), data.dropped.tolist(), data.counts.records_too_long) == (1, [0], 1)
        assert data.numbers([0]) == [1]
    else:
        assert (len(data), data.counts.records_truncated, data.longest) == (2, 1, 23)


def test_a_record_that_stays_together_is_not_split(tokenizer: Tokenizer) -> None:
    with pytest.raises(sft.UsageError, match="truncation split divides a record"):
        encode([together("yes", "no")], tokenizer, 256, 24, truncation="split")


@pytest.mark.parametrize(
    "more", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"lazy": True}, {"dataset_num_proc": 2}))]
)
def test_a_run_learns_them_as_records_of_one(train: Train, metrics: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    """Against a run whose records are the single conversations: all in one step, so that both learn the same."""
    records = [record_of(number) for number in range(8)]
    singles = [{"src": one["ask"], "tgt": answer} for one in records for answer in one["answers"]]
    settings = {"max_steps": 1, "do_eval": False, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    data, alone = write_data(tmp_path / "data", records), write_data(tmp_path / "single", singles)
    train("alone", dataset_name_or_path=str(alone), per_device_train_batch_size=24, **settings)
    train("out", (Threes,), dataset_name_or_path=str(data), per_device_train_batch_size=8, **settings, **more)
    [found], [expected] = metrics(tmp_path / "out", same=True), metrics(tmp_path / "alone", same=True)
    assert found["target_tokens"] == expected["target_tokens"]
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_and_asks_the_first(train: Train, metrics: Any, tmp_path: Path) -> None:
    records = [record_of(number) for number in range(8)]
    data = write_data(tmp_path / "data", records, records[:2])
    settings = {"dataset_name_or_path": str(data), "num_samples": 1, "max_new_tokens": 3, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}
    whole = train("whole", (Threes,), **settings)
    train("again", (Threes,), resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **settings)
    assert metrics(tmp_path / "again", same=True) == metrics(tmp_path / "whole", same=True)
    assert whole.samples[0]["prompt"] == records[0]["ask"]
    assert whole.samples[0]["reference"] == "a warm one"
    assert whole.data["train"]["records"] == 8


def test_one_without_a_target_is_a_bad_record(train: Train, tmp_path: Path) -> None:
    def half(self: sft.Plugin, record: dict[str, Any]) -> Any:
        found = read(self, record)
        return Conversation(found, beside=[Conversation(found[:1])])

    data = write_data(tmp_path / "data", [record_of(1)])
    with pytest.raises(sft.UsageError, match=r"train.json, line 1: no turn of this record is a target"):
        train("out", (toy("half", sft_record_format=half),), dataset_name_or_path=str(data), max_steps=1)


@pytest.mark.slow
def test_the_report_shows_all_of_a_record(models: Path, tmp_path: Path) -> None:
    records = [record_of(3), record_of(5), record_of(3)]
    data = write_data(tmp_path / "data", records)
    values = {"model_name_or_path": str(models / "llama-tied-gqa"), "dataset_name_or_path": str(data)}
    report = data_report(values, Wanted(3, "coat 5"), lambda text: None, (Threes,))
    [shown] = report.records
    learned = ["".join(piece.text for piece in row if piece.learned) for row in shown.rows]
    assert [text.partition("<")[0].strip() for text in learned] == ["a warm one for you for you", "none", "coat 5"]
    split = report.splits["train"]
    assert split.counts["records"] == 3
    assert split.turns == {"user": 9, "assistant": 9}
    assert split.lengths is not None
    alone = [turns for one in records for turns in read(None, one).together]  # type: ignore[arg-type]
    each = [whole_length(turns, Tokenizer(models / "llama-tied-gqa")) for turns in alone]
    assert split.lengths.longest == max(each)
    assert split.over_long == 0
