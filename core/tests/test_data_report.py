"""What ``sft data`` finds, against an independent recount, and how it is shown."""

from __future__ import annotations

import html.parser
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from conversations import LONG

import sft
from sft.commands.data import command
from sft.data.batches import PaddedCollator, Schedule
from sft.data.encoding import encode
from sft.data.tokenizer import Tokenizer
from sft.data_report import near
from sft.data_report.gather import Wanted, data_report
from sft.data_report.look import Look
from sft.data_report.near import NearSample, pieces_of
from sft.data_report.records import Writer
from sft.data_report.rows import RowTally
from sft.data_report.tallies import LengthTally
from sft.data_report.value import DataReport
from sft.errors import UsageError
from sft.seams import Batch
from sft.testing import write_data

Look_ = Callable[..., DataReport]
EVIL = '<script>alert(1)</script></pre><img src=x onerror="alert(2)">\x1b[2J\u202egnp'


def records(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions and answers of some words, a few of them several times."""
    words = "red blue warm light coat shirt dress summer city rain long short".split()
    draw = random.Random(seed)
    made = [
        {"src": " ".join(draw.choices(words, k=draw.randint(1, 9))), "tgt": " ".join(draw.choices(words, k=5))}
        for _ in range(number)
    ]
    return [*made, *draw.choices(made, k=number // 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = records(60)
    return write_data(tmp_path_factory.mktemp("data"), train, [*records(6, seed=1), *train[10:14]])


@pytest.fixture
def look(base_model: Path, folder: Path) -> Look_:
    """The report on the data in ``folder``, with other settings, records and texts where these are given."""

    def make(number: int = 1, find: str | None = None, **settings: Any) -> DataReport:
        values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(folder), **settings}
        return data_report(values, Wanted(number, find), lambda text: None)

    return make


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.json").read_text().splitlines()]


def turns_of(record: dict[str, str]) -> sft.Conversation:
    return sft.Conversation([sft.Turn("user", record["src"]), sft.Turn("assistant", record["tgt"], trains=True)])


# --- figures ------------------------------------------------------------------------------------------------


def test_figures_equal_a_recount(look: Look_, folder: Path, base_model: Path) -> None:
    tokenizer, longest = Tokenizer(base_model), 40
    report = look(max_length=longest, src_length=16)
    for split in ("train", "dev"):
        found, held = report.splits[split], read(folder, split)
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


def test_duplicates_and_overlap_equal_a_set(look: Look_, folder: Path) -> None:
    train, dev = ([tuple(sorted(one.items())) for one in read(folder, split)] for split in ("train", "dev"))
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


def test_conversations_that_differ_in_a_role_a_call_or_a_tool_are_no_duplicates(
    base_model: Path, tmp_path: Path, look: Look_
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [{"role": "system", "content": "a"}, *messages]
    thought = [messages[0], {**messages[1], "reasoning_content": "so"}]
    data = write_data(tmp_path / "d", [{"messages": one} for one in (messages, other, thought, messages)])
    assert look(dataset_name_or_path=str(data)).splits["train"].duplicates.records == 1


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
    contents = [random.Random(5).getrandbits(60) for _ in range(1)] + [7 * n * n + 1 for n in range(200)]
    held = []
    for order in (contents, contents[::-1], sorted(contents)):
        sample = NearSample(most=20)
        for number, content in enumerate(order * 2):
            if sample.takes(content):
                sample.add(content, number, f"text {content}")
        held.append(sorted(sample._held))
    assert held[0] == held[1] == held[2] == sorted(contents)[:20]


def test_without_the_library_a_note_says_how_to_get_it(look: Look_, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "LIBRARY", "no_such_library")
    report = look()
    assert report.splits["train"].near_duplicates is None
    assert near.MISSING in report.notes


@pytest.mark.parametrize("plugin", [None, "zero-padding", "greedy-zero-padding"])
def test_rows_are_those_of_a_run(look: Look_, folder: Path, base_model: Path, plugin: str | None) -> None:
    settings: dict[str, Any] = {"max_length": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    report = look(**settings, **({"plugin": plugin} if plugin else {}))
    tokenizer = Tokenizer(base_model)
    data = encode([turns_of(record) for record in read(folder)], tokenizer, 1024, 64)
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
    class Full(PaddedCollator):
        """Pads to 32 tokens."""

    class Wide:
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


def test_what_several_processes_find_is_what_one_finds(look: Look_) -> None:
    settings = {"max_length": 40, "src_length": 16, "on_bad_record": "skip"}
    assert look(3, "coat", **settings) == look(3, "coat", dataset_num_proc=2, **settings)


def test_bad_records_are_counted_and_the_first_is_named(look: Look_, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"src": "a", "tgt": "b"}\n' * 40 + '{"src": "a"}\n')
    split = look(dataset_name_or_path=str(tmp_path), on_bad_record="skip").splits["train"]
    assert split.counts["records_skipped"] == 1
    assert str(split.first_skipped).startswith(f'{tmp_path / "train.json"}, line 41: the record has no "tgt"')
    assert split.formats == {"src/tgt": 40}
    with pytest.raises(UsageError, match="line 41"):
        look(dataset_name_or_path=str(tmp_path))


def test_records_that_the_model_cannot_read_are_counted(look: Look_, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", [{"src": "a", "tgt": "b"}, {"src": "a", "tgt": "b " * 3000}])
    report = look(dataset_name_or_path=str(data), max_length=10_000)
    assert report.splits["train"].over_model == 1
    assert any(re.search(r"1 train record.*--max_length \d+", note) for note in report.notes)


@pytest.mark.parametrize("truncation", ["left", "right", "drop", "split"])
def test_what_truncation_keeps_is_shown(look: Look_, base_model: Path, tmp_path: Path, truncation: str) -> None:
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


@pytest.mark.parametrize("until", ["first_exhausted", "all_exhausted"])
def test_mixed_sets_are_counted_by_set_and_packed_as_a_run_mixes_them(
    look: Look_, folder: Path, base_model: Path, tmp_path: Path, until: str
) -> None:
    from sft.data.encoded import joined
    from sft.data.mixing import Mix, pass_order

    other = tmp_path / "other.json"
    other.write_text("\n".join(map(json.dumps, records(15, seed=8))))
    named = f"{folder / 'train.json'}:0.7,{other}:0.3"
    report = look(dataset_name_or_path=named, mix_until=until, per_device_train_batch_size=4)
    tokenizer = Tokenizer(base_model)
    parts = [
        encode([turns_of(json.loads(line)) for line in path.read_text().splitlines()], tokenizer, 1024, 2048)
        for path in (folder / "train.json", other)
    ]
    split = report.splits["train"]
    assert [one.counts for one in split.sets.values()] == [part.report() for part in parts]
    assert split.counts == joined(parts).report()
    order, _ = pass_order(Mix((0.7, 0.3), 42, until == "all_exhausted"), [len(part) for part in parts], [0, 0])
    assert report.rows is not None
    assert report.rows.records == len(order)
    assert report.rows.tokens == joined(parts).lengths[order].sum()


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


# --- records ------------------------------------------------------------------------------------------------


def test_highlighted_tokens_are_those_of_the_mask(base_model: Path, look: Look_, folder: Path) -> None:
    tokenizer = Tokenizer(base_model)
    report = look(20)
    data = encode([turns_of(record) for record in read(folder)], tokenizer, 1024, 2048)
    specials = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    assert len(report.records) == 20
    for number, shown in enumerate(report.records):
        (row,) = shown.rows
        assert shown.place == f"{folder / 'train.json'}, line {number + 1}"
        assert shown.learned == (data[number].labels != -100).sum()
        assert "".join(piece.text for piece in row if piece.learned) == tokenizer.decode(
            data[number].labels[data[number].labels != -100]
        )
        assert {piece.text for piece in row if piece.special} <= specials
        assert all(piece.special or not any(text in piece.text for text in specials) for piece in row)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_joined_are_the_decoded_text(kind: str) -> None:
    folder = Path(__file__).parent / "fixtures" / "templates" / "tokenizers"
    from tokenizers import Tokenizer as Backend

    class Bare:
        backend = Backend.from_file(str(folder / f"{kind}.json"))

        def decode(self, ids: Any) -> str:
            return str(self.backend.decode(list(ids), skip_special_tokens=False))

    ids = Bare.backend.encode("Where is it, Zoë? <b> Ça va — 你好 here").ids
    for seed in range(20):
        trained = np.repeat(np.random.default_rng(seed).random(len(ids) // 4 + 1) < 0.5, 4)[: len(ids)]
        pieces = Writer(Bare()).pieces(np.array(ids), trained)  # type: ignore[arg-type]
        assert "�" in "".join(piece.text for piece in pieces) or "".join(
            piece.text for piece in pieces
        ) == Bare().decode(ids)


def test_find_shows_the_records_that_hold_a_text(look: Look_, folder: Path) -> None:
    wanted = [n for n, one in enumerate(read(folder)) if "rain" in one["src"] + "\n" + one["tgt"]]
    dev = sum("rain" in one["src"] + "\n" + one["tgt"] for one in read(folder, "dev"))
    report = look(2, "RAIN")
    assert report.found == len(wanted) + dev > 2
    assert [record.place for record in report.records] == [
        f"{folder / 'train.json'}, line {number + 1}" for number in wanted[:2]
    ]
    assert look(2, "no such text").found == 0


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    return write_data(tmp_path / "evil", [{"src": EVIL, "tgt": f"[red]{EVIL}[/red]"}, {"src": "plain", "tgt": "text"}])


def typed(base_model: Path, data: Path, *arguments: str, **run: Any) -> click.testing.Result:
    line = ["--model_name_or_path", str(base_model), "--dataset_name_or_path", str(data), *arguments]
    return click.testing.CliRunner().invoke(command, line, standalone_mode=False, catch_exceptions=False, **run)


def test_without_a_terminal_brackets_stand_around_what_is_learned(base_model: Path, folder: Path, look: Look_) -> None:
    out = typed(base_model, folder, "--show", "3").stdout
    inside = re.findall(r"⟦(.*?)⟧", out, re.DOTALL)
    learned = ["".join(piece.text for piece in record.rows[0] if piece.learned) for record in look(3).records]
    assert inside[: len(learned)] == learned
    assert "\x1b" not in out


def test_what_data_holds_is_no_order_to_the_terminal(base_model: Path, evil: Path) -> None:
    out = typed(base_model, evil).stdout
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]<script>" in out.replace("⟦", "")


def test_in_a_terminal_what_is_learned_is_highlighted(look: Look_) -> None:
    from rich.console import Console

    from sft.data_report.terminal import write

    report = look(1)
    learned = "".join(piece.text for piece in report.records[0].rows[0] if piece.learned)
    for colours, has in ((False, True), (True, False)):
        out = StringIO()
        console = Console(file=out, force_terminal=True, color_system="standard", no_color=colours, width=200)
        write(report, console)
        assert ("\x1b[30;42m" in out.getvalue()) is has
        assert ("⟦" in out.getvalue()) is not has
        marked = "".join(re.findall(r"\x1b\[(?:1;)?30;42m(.*?)\x1b\[0m", out.getvalue(), re.DOTALL))
        assert not has or marked.replace("↵\n", "\n").removesuffix("learned") == learned


class Page(html.parser.HTMLParser):
    """Reads a page: the tags that it has, and the texts of its records."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.within: list[str] = []
        self.records: list[str] = []
        self.learned: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "br", "input", "img"):
            self.within.append(tag)
        if tag == "article":
            self.records.append("")
            self.learned.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.within.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.within:
            self.records[-1] += data
            self.learned[-1] += data if "mark" in self.within else ""


def test_in_the_page_a_script_in_the_data_is_text(base_model: Path, evil: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = typed(base_model, evil, "--html", str(target))
    assert done.stdout == ""
    page = Page()
    page.feed(target.read_text(encoding="utf-8"))
    page.close()
    assert page.within == []
    assert page.tags["script"] == 1  # the page's own
    assert page.tags["img"] == 0
    assert page.tags["article"] == 2
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    assert "<script>alert(1)</script></pre><img" in page.records[0]
    assert "<script>alert(1)</script></pre><img" in page.learned[0]
    assert "\\x1b[2J\\u202egnp" in page.learned[0]
    assert "http" not in target.read_text(encoding="utf-8").replace("http-equiv", "")


def test_the_pages_policy_allows_its_own_script_alone(look: Look_) -> None:
    import base64
    import hashlib

    from sft.data_report.page import page

    text = page(look())
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_json_is_the_value(base_model: Path, folder: Path, look: Look_) -> None:
    out = typed(base_model, folder, "--json", "--show", "2", "--max_length", "64").stdout
    assert json.loads(out) == json.loads(json.dumps(look(2, max_length=64).as_dict()))


def test_a_settings_file_serves_both_commands(base_model: Path, folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    values = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(folder), "max_length": 50}
    settings.write_text(json.dumps({**values, "output_dir": str(tmp_path / "out"), "learning_rate": 0.1}))
    done = click.testing.CliRunner().invoke(command, ["--json", str(settings), "--max_length", "64"])
    assert json.loads(done.stdout)["settings"]["max_length"] == 64
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--show", "many"), "show: expected a number of records from 0 to 10,000, got 'many'."),
        (("--show", "-1"), "show: expected a number of records from 0 to 10,000, got '-1'."),
        (("--show", "10001"), "show: expected a number of records"),
        (("--find", ""), "find: expected a text to look for"),
        (("--html", "."), "html: . is a folder"),
        (("--html", "/nowhere/at/all.html"), "is in no folder that can be written to"),
        (("--html", "{data}/train.json"), "train.json is there, and is no page of sft data"),
        (("--max_length", "much"), "max_length"),
        (("--dataset_name_or_path", "nowhere"), "Data nowhere does not exist"),
        (("--lazy", "true"), "lazy streams the data"),
    ],
)
def test_what_cannot_be_is_refused(base_model: Path, folder: Path, arguments: tuple[str, ...], says: str) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=re.escape(says)):
        typed(base_model, folder, *(one.format(data=folder) for one in arguments))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_page_takes_the_place_of_an_older_one(base_model: Path, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    for _ in range(2):
        assert typed(base_model, folder, "--html", str(target)).exit_code == 0
    assert target.read_text().startswith("<!doctype html>")


def test_neither_paddle_nor_weights_are_needed(base_model: Path, folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(base_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    code = (
        "import sys; from sft.commands.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "assert 'paddle' not in sys.modules"
    )
    line = ["data", "--model_name_or_path", str(bare), "--dataset_name_or_path", str(folder)]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train data" in done.stdout


def test_looking_is_encoding(base_model: Path, folder: Path) -> None:
    """What :class:`Look` adds leaves what a run learns from as it is."""
    tokenizer = Tokenizer(base_model)
    group: list[Any] = [turns_of(record) for record in read(folder)]
    seen = Look(tokenizer, 16, 40)(group)
    assert seen.fingerprint() == encode(group, tokenizer, 16, 40).fingerprint()
