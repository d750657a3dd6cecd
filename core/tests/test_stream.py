"""Data that is streamed: windows, their shuffling, and finding the place again."""

from __future__ import annotations

import itertools
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped_runs import StoppedError, stopping_when_saved

import sft
from sft.conversations import Turn
from sft.data import contents
from sft.data.batches import PaddedCollator, Schedule
from sft.data.encoded import Counts, Encoded
from sft.data.feeds import InTurn
from sft.data.sets import DataSet
from sft.data.stream import Stream
from sft.progress import Progress


def encode(conversations: Any) -> Encoded:
    """A record is its number: three tokens of that id; negative numbers are dropped."""
    numbers = [int(turns[0].content) for turns in conversations]
    kept = [number for number in numbers if number >= 0]
    ids = np.repeat(np.array(kept, np.int32), 3)
    counts = Counts(records=len(numbers), records_dropped=len(numbers) - len(kept), tokens=2 * len(kept))
    return Encoded(ids, np.ones(len(ids), bool), np.arange(0, len(ids) + 1, 3, dtype=np.int64), counts)


class Reader:
    """Conversations of given numbers, and a count of how many have been read."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.read = numbers, 0

    def __call__(self, place: dict[str, Any] | None) -> InTurn:
        return InTurn([DataSet("data", [])], self.after, place)

    def after(self, one: DataSet, passed: int) -> Iterator[tuple[int, list[Turn]]]:
        for place, number in enumerate(self.numbers[passed:], start=passed + 1):
            self.read += 1
            yield place, [Turn("user", str(number))]


def stream(numbers: list[int], size: int = 4) -> Stream:
    return Stream([], Reader(numbers), encode, size)


def records(data: Encoded, rows: list[tuple[int, ...]]) -> list[int]:
    return [int(data[index].input_ids[0]) for row in rows for index in row]


def test_windows_keep_the_order_and_end_with_the_pass() -> None:
    found = list(itertools.islice(stream(list(range(10))).windows(), 6))
    held = [[int(w.data[n].input_ids[0]) for n in range(len(w.data))] for w in found]
    assert held == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert [w.number for w in found] == [0, 1, 2, 3, 4, 5]
    assert [(w.passes, w.passes_after) for w in found] == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2)]


def test_a_window_is_read_when_it_is_needed() -> None:
    reader = Reader(list(range(100)))
    windows = Stream([], reader, encode, 4).windows()
    next(windows)
    assert reader.read <= 10  # once for the first window's lengths, once on the way, each time one record ahead


@pytest.mark.parametrize("number", range(6))
def test_a_place_is_found_again(number: int) -> None:
    whole = list(itertools.islice(stream(list(range(10))).windows(), 8))
    place = json.loads(json.dumps(whole[number].place))
    fresh = stream(list(range(10)))
    again = list(itertools.islice(fresh.windows(place), 8 - number))
    assert [(w.number, w.passes, w.passes_after, w.place) for w in again] == [
        (w.number, w.passes, w.passes_after, w.place) for w in whole[number:]
    ]
    assert [w.data.ids.tolist() for w in again] == [w.data.ids.tolist() for w in whole[number:]]


def test_windows_without_a_target_are_passed_over_and_counted() -> None:
    data = stream([-1, -2, -3, -4, 5, -6])
    (window,) = itertools.islice(data.windows(), 1)
    assert window.data.ids.tolist() == [5, 5, 5]
    assert data.report()["records"] == 6
    assert data.report()["records_dropped"] == 5


def test_data_without_any_target_is_an_error_and_not_endless() -> None:
    with pytest.raises(sft.UsageError, match="No train record keeps a target"):
        next(stream([-1, -2, -3, -4, -5]).windows())


def test_a_record_that_does_not_fit_is_refused_when_its_window_is_read() -> None:
    """Record n has n + 1 tokens in its row; the model has 5 positions, so 5 is too long, in the second window."""

    def growing(conversations: Any) -> Encoded:
        lengths = [int(turns[0].content) + 2 for turns in conversations]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Encoded(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], bool), offsets)

    data = Stream([], Reader([1, 2, 3, 4, 5, 6]), growing, 4)
    data.check_fits(Path("model"), 5)
    windows = data.windows()
    assert len(next(windows).data) == 4
    with pytest.raises(sft.UsageError, match=r"A record has 8 tokens and model reads at most 6, .*--max_length 6\."):
        next(windows)
    with pytest.raises(sft.UsageError, match="A record has 6 tokens and model reads at most 5"):
        Stream([], Reader([1, 2, 3, 4]), growing, 4).check_fits(Path("model"), 4)


def test_a_fingerprint_is_computed_once(tmp_path: Path) -> None:
    """It is that of the files as they were read, not of what they have become at a later checkpoint."""
    path = tmp_path / "train.json"
    path.write_text("one")
    data = Stream([path], Reader([1, 2]), encode)
    before = data.fingerprint()
    path.write_text("two")
    assert data.fingerprint() == before
    assert not Stream([path], Reader([1, 2]), encode).has_fingerprint(before)
    path.write_text("one")
    assert Stream([path], Reader([1, 2]), encode).has_fingerprint(before)
    assert not Stream([path], Reader([1, 3]), encode).has_fingerprint(before)


def test_the_fingerprints_of_older_checkpoints_are_known(tmp_path: Path) -> None:
    """Of names and sizes, as sft 0.1.0 wrote them at commit 2f60761."""
    path = tmp_path / "train.json"
    path.write_text("one")
    data = Stream([path], Reader([1, 2]), encode)
    assert data.has_fingerprint("4d33c14cb54098af")
    path.write_text("three")
    assert not data.has_fingerprint("4d33c14cb54098af")


def test_a_file_that_changes_while_it_is_read_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("one")
    windows = Stream([path], Reader([1, 2, 3, 4, 5, 6]), encode, 2).windows()
    next(windows)
    path.write_text("one")  # written to, and the same
    os.utime(path, (1, 1))
    next(windows)
    path.write_text("two")
    with pytest.raises(sft.UsageError, match=r"train\.json has been changed while this run reads it; put it back"):
        next(windows)


@pytest.mark.parametrize("size", [0, 1, 128, 129, 1000])
def test_every_block_that_counts_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Blocks of 16 bytes, 8 of them: all of a file of up to 128 bytes, and of a larger one its first byte, its last
    one, and a part of what is between; and its size."""
    monkeypatch.setattr(contents, "BLOCK", 16)
    monkeypatch.setattr(contents, "BLOCKS", 8)
    path, plain = tmp_path / "data", bytes(size)
    path.write_bytes(plain)
    before, noticed = contents.digest_of(path), set()
    for place in range(size):
        path.write_bytes(plain[:place] + b"x" + plain[place + 1 :])
        if contents.digest_of(path) != before:
            noticed.add(place)
    assert len(noticed) == (size if size < 128 else 128)
    assert max(np.diff(sorted({-1, size, *noticed}))) <= max(1, (size - 16) / 7 - 14)
    path.write_bytes(plain + b"\0")
    assert contents.digest_of(path) != before


def test_each_pass_holds_every_record_once_and_windows_are_shuffled_apart() -> None:
    plan = Schedule(stream(list(range(10))), PaddedCollator(0), 3, 2, 1.0, 100)
    steps = list(itertools.islice(plan.iterate(), 10))
    first = [number for step in steps[:5] for number in records(step.data, step.rows)]
    second = [number for step in steps[5:] for number in records(step.data, step.rows)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert [sorted(part) for part in (first[:4], first[4:8], first[8:])] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert first != second
    assert [step.number for step in steps if step.ends_pass] == [5, 10]


@pytest.mark.parametrize("start", range(1, 12))
def test_a_schedule_goes_on_from_a_place(start: int) -> None:
    def steps(place: dict[str, Any] | None, begin: int, number: int) -> list[Any]:
        plan = Schedule(stream(list(range(10))), PaddedCollator(0), 3, 3, 1.0, 100)
        found = itertools.islice(plan.iterate(begin, place), number)
        return [(s.number, s.epoch, records(s.data, s.rows), s.place, s.ends_pass) for s in found]

    whole = steps(None, 0, 16)
    assert steps(whole[start - 1][3], start, 16 - start) == whole[start:]


# --- in a run -----------------------------------------------------------------------------------------------


def test_a_streamed_run_of_one_window_equals_one_that_reads_everything(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path
) -> None:
    train("whole", max_steps=4)
    train("lazy", max_steps=4, lazy=True)
    assert [line["loss"] for line in metrics(tmp_path / "lazy") if "loss" in line] == [
        line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line
    ]


def test_only_a_stream_that_is_found_again_passes_over_records(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 7 records are 3 steps each."""
    monkeypatch.setattr(Stream.__init__, "__defaults__", (7,))
    begun: list[tuple[Any, ...]] = []
    task = Progress.task

    def noted(self: Progress, *about: Any, **more: Any) -> Any:
        begun.append(about)
        return task(self, *about, **more)

    monkeypatch.setattr(Progress, "task", noted)
    settings = {"lazy": True, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 3}
    for steps, expected in ((4, []), (6, [("passing over records", "records", 7)])):
        begun.clear()
        train(max_steps=steps, resume_from_checkpoint="auto", **settings)
        assert [about for about in begun if about[0] == "passing over records"] == expected


def test_a_streamed_run_resumes_where_it_stopped(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 records in windows of 7, 3 rows a step: step 9 is in the middle of a window, 14 in the second pass."""
    monkeypatch.setattr(Stream.__init__, "__defaults__", (7,))

    same = {"lazy": True, "max_steps": 18, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 1}
    train("whole", **same)
    for after in (9, 14):
        with pytest.raises(StoppedError):
            train(f"parts-{after}", plugins=(stopping_when_saved(after),), **same)
        train(f"parts-{after}", resume_from_checkpoint="auto", **same)
        assert metrics(tmp_path / f"parts-{after}", same=True) == metrics(tmp_path / "whole", same=True)
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", f"parts-{after}")]
        assert weights[0] == weights[1]


def test_a_run_begins_with_the_first_window_however_long_the_file_is(
    train: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last line is wrong, and never reached; memory is that of a window."""
    monkeypatch.setattr(Stream.__init__, "__defaults__", (20,))
    line = (dataset / "train.json").read_text().splitlines()[0]
    peaks = []
    settings = {"lazy": True, "max_steps": 3, "per_device_train_batch_size": 10}
    for name, number in (("imports", 100), ("short", 100), ("long", 200_000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.json").write_text(f"{line}\n" * number + "no record\n")
        tracemalloc.start()
        summary = train(f"out-{name}", dataset_name_or_path=str(folder), **settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary.data["train"]["records"] == 40
    size = (folder / "train.json").stat().st_size
    assert size > 7_000_000
    assert peaks[2] < peaks[1] + size / 4


@pytest.mark.parametrize("change", ["longer", "other order"])
def test_other_data_behind_the_first_window_is_noticed(
    train: Callable[..., Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(Stream.__init__, "__defaults__", (7,))
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (dataset / "train.json").read_text().splitlines()
    (folder / "train.json").write_text("\n".join(lines))
    same = {"dataset_name_or_path": str(folder), "lazy": True, "save_strategy": "steps", "save_steps": 1}
    train("out", max_steps=1, **same)
    changed = [*lines, lines[0]] if change == "longer" else [*lines[:-3], lines[-1], lines[-2], lines[-3]]
    (folder / "train.json").write_text("\n".join(changed))
    with pytest.raises(sft.UsageError, match="was trained on other tokens"):
        train("out", max_steps=2, resume_from_checkpoint="auto", **same)


def lines(folder: Path, *records: tuple[str, str]) -> str:
    folder.mkdir()
    text = "\n".join(json.dumps({"src": source, "tgt": target}) for source, target in records)
    (folder / "train.json").write_text(text)
    return str(folder)


def test_a_long_record_behind_the_first_window_does_not_train(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream.__init__, "__defaults__", (4,))
    data = lines(tmp_path / "data", *[("a", "b")] * 6, ("a b c " * 60, "d"))
    settings = {"dataset_name_or_path": data, "lazy": True, "max_steps": 4, "per_device_train_batch_size": 2}
    with pytest.raises(sft.UsageError, match=r"A record has \d+ tokens and .* reads at most 65, .*--max_length 65"):
        train(**settings)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train("shorter", max_length=64, src_length=50, **settings)


def test_a_first_window_without_a_target_is_passed_over(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream.__init__, "__defaults__", (2,))
    data = lines(tmp_path / "data", *[("a", "d")] * 2, ("a", "be kind"), ("c", "be good"))
    # Writes the answer alone: of an answer of one token nothing is learned, for nothing stands before it.
    template = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    (tmp_path / "answer.jinja").write_text(template)
    settings = {"dataset_name_or_path": data, "lazy": True, "per_device_train_batch_size": 1}
    summary = train(max_steps=2, chat_template=str(tmp_path / "answer.jinja"), **settings)
    # Of the one window that was dropped and the one that trained; none was read behind the last step.
    assert (summary.rows, summary.data["train"]["records"], summary.data["train"]["records_dropped"]) == (2, 4, 2)


def test_samples_are_the_first_records_however_often_they_are_read(train: Callable[..., Any], tmp_path: Path) -> None:
    data = lines(tmp_path / "data", *[(name, name) for name in "abc"])
    settings = {"dataset_name_or_path": data, "lazy": True, "per_device_train_batch_size": 3}
    summary = train(max_steps=4, num_samples=9, max_new_tokens=2, **settings)
    assert [sample["prompt"] for sample in summary.samples] == ["a", "b", "c"]


def test_a_stream_needs_max_steps(train: Callable[..., Any]) -> None:
    with pytest.raises(sft.UsageError, match="give max_steps"):
        train(lazy=True)


def test_counts_of_older_checkpoints_are_read() -> None:
    found = Counts.of({"records": 3, "dropped": 1, "answers_without_end": 2, "tokens": 9})
    assert found == Counts(records=3, records_dropped=1, records_without_end=2, tokens=9)
