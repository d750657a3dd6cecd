"""What ``sft data`` finds, against an independent recount."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversations import LONG
from data_reports import Looking, read, records, turns_of
from toy_plugins import toy

import sft
from sft.data.batches import PaddedCollator, Schedule
from sft.data.encoded import joined
from sft.data.encoding import encode
from sft.data.mixing import Mix, pass_order
from sft.data.tokenizer import Tokenizer
from sft.data_report import near
from sft.data_report.gather import Wanted, data_report
from sft.data_report.look import Look, hash_of
from sft.data_report.near import NearSample, pieces_of
from sft.data_report.rows import RowTally
from sft.data_report.tallies import LengthTally
from sft.errors import UsageError
from sft.seams import Batch
from sft.testing import needs, write_data


def test_figures_equal_a_recount(look: Looking, questions: Path, base_model: Path) -> None:
    tokenizer, longest = Tokenizer(base_model), 40
    report = look(max_length=longest, src_length=16)
    for split in ("train", "dev"):
        found, held = report.splits[split], read(questions, split)
        kept = encode([turns_of(record) for record in held], tokenizer, 16, longest)
        lengths = np.diff(encode([turns_of(record) for record in held], tokenizer, LONG, LONG).offsets).tolist()
        assert found.counts == kept.report()
        assert found.counts["prompts_truncated"] > 0
        assert found.formats == {"src/tgt": len(held)}
        assert found.turns == {"user": len(held), "assistant": len(held)}
        assert found.trained_share == kept.trained.sum() / kept.lengths.sum()
        assert found.lengths is not None
        assert found.lengths.longest == max(lengths)
        assert found.lengths.mean == pytest.approx(np.mean(lengths))
        ranked = sorted(lengths)
        assert found.lengths.median == ranked[-(-len(ranked) // 2) - 1]
        assert found.lengths.percentile_90 == ranked[-(-len(ranked) * 90 // 100) - 1]
        for bar in found.lengths.bars:
            assert bar.records == sum(bar.first <= length <= bar.last for length in lengths)
        assert sum(bar.records for bar in found.lengths.bars) == len(held)
        assert found.over_long == sum(length > longest for length in lengths)


def test_duplicates_and_overlap_equal_a_set(look: Looking, questions: Path) -> None:
    train, dev = ([tuple(sorted(one.items())) for one in read(questions, split)] for split in ("train", "dev"))
    report = look()
    found = report.splits["train"].duplicates
    assert found.records == len(train) - len(set(train)) > 0
    for pair in found.first:
        one, earlier = (int(re.findall(r"line (\d+)$", place)[0]) - 1 for place in (pair.record, pair.earlier))
        assert earlier < one
        assert train[one] == train[earlier]
    assert report.overlap is not None
    assert report.overlap.records == sum(one in set(train) for one in dev) >= 4
    first = report.overlap.first[0]
    assert "dev.json" in first.record
    assert "train.json" in first.earlier


def test_all_that_a_model_sees_of_a_conversation_tells_it_from_others() -> None:
    def said(*turns: sft.Turn, tools: Any = ()) -> sft.Conversation:
        return sft.Conversation(turns, tools=tools)

    asks, answers = sft.Turn("user", "a"), sft.Turn("assistant", "b", trains=True)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": 1, "y": 2}}}
    call = dataclasses.replace(answers, tool_calls=(sft.ToolCall("f", {"x": 1}),))
    different = [
        said(asks, answers),
        said(asks, answers, tools=[tool]),
        said(asks, dataclasses.replace(answers, reasoning="so")),
        said(asks, call),
        said(asks, dataclasses.replace(answers, tool_calls=(sft.ToolCall("f", {"x": 2}),))),
        said(dataclasses.replace(asks, role="system"), answers),
        said(sft.Turn("user", "ab"), sft.Turn("assistant", "", trains=True)),
        said(asks, answers, asks, answers),
    ]
    assert len({hash_of(one) for one in different}) == len(different)
    parameters = {"y": 2, "x": 1}
    again = {"function": {"parameters": parameters, "name": "f"}, "type": "function"}
    assert hash_of(said(asks, answers, tools=[again])) == hash_of(different[1])
    assert hash_of(said(asks, dataclasses.replace(answers, trains=False))) == hash_of(different[0])


def jaccard(one: str, other: str) -> float:
    first, second = ({text[n : n + 5] for n in range(len(text) - 4)} for text in (one, other))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_those_of_exact_likeness() -> None:
    pytest.importorskip("datasketch")
    draw = random.Random(3)
    texts = ["".join(draw.choices("abcdefgh ", k=200)).strip() for _ in range(30)]
    texts = [" ".join(text.split()) for text in texts]
    texts += [texts[4][:-3] + "xyz", texts[9] + " and more", texts[12][:120] + texts[13][:80]]
    sample = NearSample()
    for number, text in enumerate(texts):
        assert sample.takes(number)
        sample.add(number, number, text)
    places = [str(number) for number in range(len(texts))]
    found = sample.near(len(texts), places)
    alike = {
        (two, one): jaccard(texts[one], texts[two])
        for one, two in itertools.combinations(range(len(texts)), 2)
        if jaccard(texts[one], texts[two]) > 0.5
    }
    assert {pair for pair, likeness in alike.items() if likeness >= 0.8} == {(30, 4), (31, 9)}
    assert {(int(pair.record), int(pair.earlier)) for pair in found.first} == {(30, 4), (31, 9)}
    assert found.records == 2
    for pair in found.first:
        # 128 permutations: the standard error is at most 0.5 / √128 = 0.044, and this is three of them.
        assert abs(pair.likeness - alike[int(pair.record), int(pair.earlier)]) < 0.13
    for one, two in itertools.islice(itertools.combinations(texts, 2), 100):
        first, second = set(pieces_of(one).tolist()), set(pieces_of(two).tolist())
        assert len(first & second) / len(first | second) == jaccard(one, two)


def test_the_sample_of_near_duplicates_is_the_same_in_any_order() -> None:
    pytest.importorskip("datasketch")
    contents = [random.Random(5).getrandbits(60)] + [7 * n * n + 1 for n in range(200)]
    held = []
    for order in (contents, contents[::-1], sorted(contents)):
        sample = NearSample(most=20)
        for number, content in enumerate(order * 2):
            if sample.takes(content):
                sample.add(content, number, f"text {content}")
        held.append(sorted(sample._held))
    assert held[0] == held[1] == held[2] == sorted(contents)[:20]


def test_without_the_library_a_note_says_how_to_get_it(look: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "LIBRARY", "no_such_library")
    report = look(0)
    assert report.splits["train"].near_duplicates is None
    assert near.MISSING in report.notes


PACKING = [
    pytest.param(None, marks=pytest.mark.slow),
    pytest.param("zero-padding", marks=[pytest.mark.slow, needs("zero-padding")]),
    pytest.param("greedy-zero-padding", marks=needs("greedy-zero-padding")),
]
TRUNCATION = ["split", *(pytest.param(how, marks=pytest.mark.slow) for how in ("left", "right", "drop"))]


@pytest.mark.parametrize("plugin", PACKING)
def test_rows_are_those_of_a_run(look: Looking, questions: Path, base_model: Path, plugin: str | None) -> None:
    settings: dict[str, Any] = {"max_length": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    report = look(**settings, **({"plugin": plugin} if plugin else {}))
    tokenizer = Tokenizer(base_model)
    data = encode([turns_of(record) for record in read(questions)], tokenizer, 1024, 64)
    collator: Any = PaddedCollator(tokenizer.pad_id)
    if plugin is not None:
        collators = pytest.importorskip("sft_data_packing.collators")
        pad = tokenizer.pad_id
        collator = (
            collators.NextFitCollator(64, pad) if plugin == "zero-padding" else collators.BestFitCollator(64, pad, 4096)
        )
    schedule = Schedule(data, collator, 42, 8, 1.0, -1)
    steps = itertools.islice(schedule.batches(0, None, 0, 1, 4), schedule.total_steps)
    batches = [batch for _, part in steps for batch in part]
    assert report.rows is not None
    assert report.rows.steps == schedule.total_steps
    assert report.rows.rows == sum(len(batch.input_ids) for batch in batches)
    assert report.rows.tokens == sum(batch.tokens for batch in batches) == data.lengths.sum()
    assert report.rows.padding_tokens == sum(batch.padding_tokens for batch in batches)
    assert report.rows.window is None


def test_the_padding_is_what_the_collator_makes_even_if_it_pads_otherwise() -> None:
    class Wide:
        """Pads to 32 tokens."""

        packs = False

        def rows(self, lengths: np.ndarray, rng: Any) -> list[tuple[int, ...]]:
            return PaddedCollator(0).rows(lengths, rng)

        def batch(self, rows: Any) -> Batch:
            made = PaddedCollator(0).batch(rows)
            wide = np.zeros((len(made.input_ids), 32), np.int64)
            return Batch(wide, wide - 100, wide, made.startend_row_indices, made.lengths)

    lengths = np.arange(1, 31)
    for window in (None, 7):
        tally = RowTally(Wide(), "wide", 1, 4, 1, window)
        tally.add(lengths[:20], np.arange(20))
        tally.add(lengths[20:], np.arange(20, 30))
        assert tally.count().padding_tokens == 30 * 32 - lengths.sum()
        assert tally.count().rows == 30


def test_lazy_rows_are_packed_in_the_windows_of_a_run(base_model: Path) -> None:
    lengths, collator = np.random.default_rng(0).integers(1, 60, 1000), PaddedCollator(0)
    tally = RowTally(collator, "padding", 5, 8, 1, 256)
    for start in range(0, 1000, 100):
        tally.add(lengths[start : start + 100], np.arange(start, start + 100))
    padding = 0
    for number, start in enumerate(range(0, 1000, 256)):
        window = lengths[start : start + 256]
        rows = [window[row[0]] for row in collator.rows(window, np.random.default_rng([5, number]))]
        padding += sum(max(rows[at : at + 8]) * len(rows[at : at + 8]) for at in range(0, len(rows), 8)) - window.sum()
    assert tally.count().padding_tokens == padding


@pytest.mark.slow
def test_what_several_processes_find_is_what_one_finds(look: Looking) -> None:
    settings = {"max_length": 40, "src_length": 16, "on_bad_record": "skip"}
    assert look(3, "coat", **settings) == look(3, "coat", dataset_num_proc=2, **settings)


def test_bad_records_are_counted_and_the_first_is_named(look: Looking, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"src": "a", "tgt": "b"}\n' * 40 + '{"src": "a"}\n')
    split = look(dataset_name_or_path=str(tmp_path), on_bad_record="skip").splits["train"]
    assert split.counts["records_skipped"] == 1
    assert str(split.first_skipped).startswith(f'{tmp_path / "train.json"}, line 41: the record has no "tgt"')
    assert split.formats == {"src/tgt": 40}
    with pytest.raises(UsageError, match="line 41"):
        look(dataset_name_or_path=str(tmp_path))


def test_records_that_the_model_cannot_read_are_counted(look: Looking, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", [{"src": "a", "tgt": "b"}, {"src": "a", "tgt": "b " * 3000}])
    report = look(dataset_name_or_path=str(data), max_length=10_000)
    assert report.splits["train"].over_model == 1
    assert any(re.search(r"1 train record.*--max_length \d+", note) for note in report.notes)


@pytest.mark.parametrize("truncation", TRUNCATION)
def test_what_truncation_keeps_is_shown(look: Looking, base_model: Path, tmp_path: Path, truncation: str) -> None:
    long = {"src": "red", "tgt": " ".join(f"coat{n}" for n in range(60))}
    data = write_data(tmp_path / "d", [{"src": "a", "tgt": "b"}, long])
    settings = {"dataset_name_or_path": str(data), "max_length": 50}
    report = look(5, truncation=truncation, **settings)
    tokenizer = Tokenizer(base_model)
    kept = encode([turns_of(one) for one in read(data)], tokenizer, 1024, 50, truncation=truncation)
    shown = [row for record in report.records for row in record.rows]
    assert len(shown) == len(kept)
    for number, row in enumerate(shown):
        ids = kept.ids[kept.offsets[number] : kept.offsets[number + 1]]
        assert "".join(piece.text for piece in row) == tokenizer.decode(ids)
    assert report.splits["train"].over_long == 1
    assert report.splits["train"].lengths is not None
    assert report.splits["train"].lengths.longest == len(encode([turns_of(long)], tokenizer, LONG, LONG).ids)


@pytest.mark.parametrize("until", ["first_exhausted", pytest.param("all_exhausted", marks=pytest.mark.slow)])
def test_mixed_sets_are_counted_by_set_and_packed_as_a_run_mixes_them(
    look: Looking, questions: Path, base_model: Path, tmp_path: Path, until: str
) -> None:
    other = tmp_path / "other.json"
    other.write_text("\n".join(map(json.dumps, records(15, seed=8))))
    named = f"{questions / 'train.json'}:0.7,{other}:0.3"
    report = look(dataset_name_or_path=named, mix_until=until, per_device_train_batch_size=4)
    tokenizer = Tokenizer(base_model)
    parts = [
        encode([turns_of(json.loads(line)) for line in path.read_text().splitlines()], tokenizer, 1024, 2048)
        for path in (questions / "train.json", other)
    ]
    split = report.splits["train"]
    assert [one.counts for one in split.sets.values()] == [part.report() for part in parts]
    assert split.counts == joined(parts).report()
    order, _ = pass_order(Mix((0.7, 0.3), 42, until == "all_exhausted"), [len(part) for part in parts], [0, 0])
    assert report.rows is not None
    assert report.rows.records == len(order)
    assert report.rows.tokens == joined(parts).lengths[order].sum()


def test_rows_that_cannot_be_known_are_said_to_be_unknown(look: Looking, questions: Path, base_model: Path) -> None:
    twice = f"{questions / 'train.json'}:0.5,{questions / 'dev.json'}:0.5"
    report = look(dataset_name_or_path=twice, lazy=True, max_steps=1)
    assert report.rows is None
    assert "rows are not counted where data sets are mixed by weight and lazy" in report.notes

    def collator(self: Any, run: sft.Run) -> Any:
        return PaddedCollator(int(run.precision.dtype == "float32"))

    values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(questions)}
    report = data_report(values, Wanted(0), lambda text: None, [toy(sft_collator=collator)])
    assert report.rows is None
    assert "rows are not counted: plugin toy makes them of what only a run has" in report.notes


def test_percentiles_and_bars_of_any_lengths() -> None:
    for seed, most in enumerate((1, 3, 17, 1000, 100_000)):
        lengths = np.random.default_rng(seed).integers(1, most + 1, 500)
        tally = LengthTally()
        for part in np.split(lengths, [100, 101, 400]):
            tally.add(part)
        found = tally.lengths()
        assert found is not None
        assert [found.median, found.percentile_90, found.percentile_99, found.longest] == [
            np.percentile(lengths, share, method="inverted_cdf") for share in (50, 90, 99, 100)
        ]
        assert 1 <= len(found.bars) <= 16
        assert [bar.records for bar in found.bars] == [
            ((bar.first <= lengths) & (lengths <= bar.last)).sum() for bar in found.bars
        ]
        assert sum(bar.records for bar in found.bars) == 500


def test_looking_is_encoding(base_model: Path, questions: Path) -> None:
    """What :class:`Look` adds leaves what a run learns from as it is."""
    tokenizer = Tokenizer(base_model)
    group: list[Any] = [turns_of(record) for record in read(questions)]
    seen = Look(tokenizer, 16, 40)(group)
    assert seen.fingerprint() == encode(group, tokenizer, 16, 40).fingerprint()
