"""``on_bad_record skip``: what cannot be read is left out, counted and listed, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sft
from sft import hookspecs
from sft.data.bad_records import BadRecord, Limit
from sft.data.encoding import encode
from sft.data.feeds import InTurn
from sft.data.formats import Formats
from sft.data.processes import Encoders
from sft.data.sets import DataSet
from sft.data.sources import Passing, read
from sft.data.stream import Stream
from sft.data.tokenizer import Tokenizer
from sft.files import read_report
from sft.plugins.registry import Plugins
from sft.training.skipped_records import NAME

BROKEN = {
    b'{"src": "a", "tgt": ': "is not JSON",
    b"[1, 2]": "holds list",
    b'{"src": "a"}': 'the record has no "tgt"',
    b'{"src": "a", "tgt": " "}': '"tgt" is empty',
    b'{"src": "\xff", "tgt": "b"}': "is not UTF-8 text",
    b'{"src": "a", "src": "b", "tgt": "c"}': '"src" stands twice',
    b'{"src": "\\ud800", "tgt": "b"}': "half of a surrogate pair",
    b'{"instruction": "a", "output": "b"}': "this record is Alpaca",
    b'{"src": 1' + b"0" * 5000 + b', "tgt": "b"}': "cannot be read as JSON",
}
"""Lines that are no records of src and tgt, and what is said of each."""
GOOD = [json.dumps({"src": f"number {number}", "tgt": f"answer {number % 7}"}).encode() for number in range(40)]
WHERE = {4 * number + 1: line for number, line in enumerate(BROKEN)}
"""The lines from 1 on at which those stand in :func:`mixed`."""


def mixed() -> list[bytes]:
    lines = list(GOOD)
    for line, broken in WHERE.items():
        lines.insert(line - 1, broken)
    return lines


def turns_of(path: Path, skips: bool = True, passing: Passing | None = None) -> list[Any]:
    plugins = Plugins.load([], hookspecs)
    plugins.start({})
    formats = Formats(plugins, skips)
    if passing:  # as a run does
        next(one for one in read([path], skips=skips) if isinstance(formats.turns_or_bad(one), list))
    return [formats.turns_or_bad(record) for record in read([path], passing, skips=skips)]


def bad_of(found: list[Any]) -> list[BadRecord]:
    return [one for one in found if isinstance(one, BadRecord)]


# --- readers ------------------------------------------------------------------------------------------------


def test_lines_are_skipped_with_their_reasons_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\n".join(mixed()))
    found = turns_of(path)
    assert [record.place.line for record in bad_of(found)] == list(WHERE)
    for record, said in zip(bad_of(found), BROKEN.values(), strict=True):
        assert said in record.reason
        assert "\n" not in record.reason
        assert len(record.reason) <= 500
    good = [turns[0].content for turns in found if isinstance(turns, list)]
    assert good == [f"number {number}" for number in range(40)]
    passed = turns_of(path, passing=Passing(6))  # bad ones are passed over as any
    assert [one if isinstance(one, BadRecord) else one[0].content for one in passed[1:]] == [
        one if isinstance(one, BadRecord) else one[0].content for one in found[7:]
    ]


@pytest.mark.parametrize("broken", BROKEN)
def test_each_of_them_stops_where_none_is_skipped(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\n".join([GOOD[0], broken]))
    with pytest.raises(sft.UsageError) as caught:
        turns_of(path, skips=False)
    assert BROKEN[broken] in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line 2")


def test_in_an_array_what_has_an_end_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    wrong = [b"5", b'{"src": "a", "src": "b", "tgt": "c"}', b'{"src": 1' + b"0" * 5000 + b"}"]
    path.write_bytes(b"[" + b",\n".join([GOOD[0], *wrong, GOOD[1]]) + b"]")
    found = turns_of(path)
    assert [(record.place.line, record.place.number) for record in bad_of(found)] == [(2, 2), (3, 3), (4, 4)]
    assert next(str(record.place) for record in bad_of(found)) == f"{path}, line 2 (record 2)"
    assert found[4][0].content == "number 1"
    path.write_bytes(b"[" + GOOD[0] + b', {"src": , ' + GOOD[1] + b"]")
    with pytest.raises(sft.UsageError, match=r"is not JSON .* correct the array there"):
        turns_of(path)


def test_rows_of_tables_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"src,tgt\na,b\nc\n\xff,d\ne,f\n")
    found = turns_of(path)
    assert [(record.place.line, record.reason.split(";")[0]) for record in bad_of(found)] == [
        (3, "has 1 cells and the header 2"),
        (4, "is not UTF-8 text"),
    ]
    assert [turns[0].content for turns in found if isinstance(turns, list)] == ["a", "e"]
    path.write_bytes(b'src,tgt\na,b\nc,"d\ne,f\n')  # the quote may have taken any number of rows along
    with pytest.raises(sft.UsageError, match="line 3 is not CSV"):
        turns_of(path)

    path = tmp_path / "train.parquet"
    bytes_ = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bytes_.buffers())
    pq.write_table(pa.table({"src": text, "tgt": ["x", "y", "z"]}), path)
    found = turns_of(path)
    assert [str(record.place) for record in bad_of(found)] == [f"{path}, row 2"]
    assert [turns[0].content for turns in found if isinstance(turns, list)] == ["a", "c"]


# --- encoding -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its template refuses a conversation in which number 5 asks."""
    path = tmp_path_factory.mktemp("template") / "strict.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.content == 'number 5' %}{{ raise_exception('Not that one') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return Tokenizer(models / "qwen2-untied", chat_template=str(path))


def test_several_processes_and_a_stream_skip_the_same(tmp_path: Path, strict: Tokenizer) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\n".join(mixed()))
    whole = encode(turns_of(path), strict, 64, 64, group=4, skips=True)
    places = sorted([*WHERE, mixed().index(GOOD[5]) + 1])
    assert [record.place.line for record in whole.bad] == places
    assert "Not that one" in next(record.reason for record in whole.bad if record.place.line not in WHERE)
    assert (whole.counts.records, whole.counts.records_skipped) == (40 + len(BROKEN), len(BROKEN) + 1)
    clean = tmp_path / "clean.json"
    clean.write_bytes(b"\n".join(line for line in GOOD if line != GOOD[5]))
    assert encode(turns_of(clean), strict, 64, 64).fingerprint() == whole.fingerprint()

    several = Encoders(2)
    try:
        other = encode(turns_of(path), strict, 64, 64, group=4, skips=True, by=several)
    finally:
        several.close()
    assert (other.bad, other.counts, other.fingerprint()) == (whole.bad, whole.counts, whole.fingerprint())

    def after(one: DataSet, passed: int) -> Iterator[Any]:
        return iter(list(enumerate(turns_of(path, passing=Passing(passed)), start=passed + 1)))

    def stream() -> Stream:
        return Stream(
            [path],
            lambda place: InTurn([DataSet("data", [path])], after, place),
            lambda found: encode(found, strict, 64, 64, skips=True),
            size=8,
        )

    heard: list[BadRecord] = []
    data = stream()
    data.list_bad(heard.extend)
    windows = list(islice(data.windows(), 7))
    assert np.concatenate([window.data.ids for window in windows]).tolist() == whole.ids.tolist()
    assert heard == whole.bad
    assert data.report()["records_skipped"] == len(whole.bad)
    again: list[BadRecord] = []
    resumed = stream()
    resumed.list_bad(again.extend)
    list(islice(resumed.windows(windows[1].place), 6))
    assert again == [record for record in whole.bad if record.place.line > 8]
    assert resumed.report() == data.report()


def test_more_than_the_limit_stops(tmp_path: Path, strict: Tokenizer) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\n".join(mixed()))
    found = turns_of(path)
    share = (len(BROKEN) + 1) / len(found)
    encode(found, strict, 64, 64, skips=True, check=Limit(share, "train").check)
    with pytest.raises(sft.UsageError, match=r"10 of 49 records of the train data cannot be read, and on_bad_record_"):
        encode(found, strict, 64, 64, skips=True, check=Limit(share - 0.001, "train").check)
    nothing = [found[0]] * 5000
    read_on: list[int] = []
    with pytest.raises(sft.UsageError, match=r"of 4,096 records"):
        encode((read_on.append(0) or one for one in nothing), strict, 9, 9, skips=True, check=Limit(0.5, "dev").check)
    assert len(read_on) < 5000


# --- runs ---------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "train.json").write_bytes(b"\n".join(mixed()))
    (folder / "dev.json").write_bytes(b"\n".join([*GOOD[:7], b"nothing"]))
    return folder


SKIPS = {"on_bad_record": "skip", "on_bad_record_limit": 0.3, "per_device_train_batch_size": 2}


def test_a_run_learns_what_it_would_from_the_rest(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, data: Path
) -> None:
    clean = tmp_path / "rest"
    clean.mkdir()
    (clean / "train.json").write_bytes(b"\n".join(GOOD))
    (clean / "dev.json").write_bytes(b"\n".join(GOOD[:7]))
    said: list[str] = []
    skipping = {**SKIPS, "max_steps": 3, "num_samples": 2, "max_new_tokens": 1}
    train("skips", say=said.append, dataset_name_or_path=str(data), **skipping)
    plain = {**skipping, "on_bad_record": "stop"}
    train("clean", dataset_name_or_path=str(clean), **{**plain, "on_bad_record_limit": None})
    assert metrics(tmp_path / "skips", same=True) == metrics(tmp_path / "clean", same=True)
    assert not (tmp_path / "clean" / NAME).exists()
    report = read_report(tmp_path / "skips")["result"]["data"]
    assert (report["train"]["records"], report["train"]["records_skipped"]) == (49, 9)
    assert (report["dev"]["records"], report["dev"]["records_skipped"]) == (8, 1)
    entries = listed(tmp_path / "skips")
    assert [(entry["split"], entry["line"]) for entry in entries] == [("dev", 8), *(("train", line) for line in WHERE)]
    assert {entry["file"] for entry in entries} == {str(data / "dev.json"), str(data / "train.json")}
    assert any("9 records skipped" in line for line in said)
    assert f"note: records that cannot be read are skipped; they are listed in {tmp_path / 'skips' / NAME}" in said
    with pytest.raises(sft.UsageError, match=r"train\.json, line \d+ is not"):
        train("stops", dataset_name_or_path=str(data), max_steps=1)
    assert not (tmp_path / "stops").exists()
    with pytest.raises(sft.UsageError, match=r"on_bad_record_limit 0\.1 allows 4"):
        train("few", dataset_name_or_path=str(data), max_steps=1, **{**SKIPS, "on_bad_record_limit": 0.1})


def test_what_is_kept_encoded_keeps_the_list(train: Callable[..., Any], tmp_path: Path, data: Path) -> None:
    settings = {**SKIPS, "max_steps": 1, "encoded_cache": str(tmp_path / "cache"), "dataset_name_or_path": str(data)}
    train("first", **settings)
    said: list[str] = []
    moved = data.rename(tmp_path / "moved")
    train("second", say=said.append, **{**settings, "dataset_name_or_path": str(moved)})
    assert any("train data is read encoded from" in line for line in said)
    first, second = listed(tmp_path / "first"), listed(tmp_path / "second")
    assert [{**entry, "file": ""} for entry in second] == [{**entry, "file": ""} for entry in first]
    assert second[1]["file"] == str(moved / "train.json")
    with pytest.raises(sft.UsageError, match=r"train\.json, line \d+ is not"):
        train("third", **{**settings, "on_bad_record": "stop", "dataset_name_or_path": str(moved)})
    with pytest.raises(sft.UsageError, match=r"on_bad_record_limit 0\.01"):
        train("fourth", **{**settings, "on_bad_record_limit": 0.01, "dataset_name_or_path": str(moved)})


def test_a_stream_that_goes_on_lists_each_once(
    train: Callable[..., Any], tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.data.stream.WINDOW", 8)
    monkeypatch.setattr("sft.data.stream.Stream.__init__.__defaults__", (8,))
    settings = {**SKIPS, "lazy": True, "save_strategy": "steps", "save_steps": 5, "dataset_name_or_path": str(data)}
    settings["on_bad_record_limit"] = 1.0  # the first windows hold nothing else
    train("whole", max_steps=25, **settings)
    assert [entry["line"] for entry in listed(tmp_path / "whole")][1:] == list(WHERE)
    train("parts", max_steps=5, **settings)
    begun = listed(tmp_path / "parts")
    assert 1 < len(begun) < 1 + len(WHERE)
    with (tmp_path / "parts" / NAME).open("a") as file:
        file.write('{"split": "tr')  # as a kill leaves it
    train("parts", max_steps=25, resume_from_checkpoint="auto", **settings)
    assert (tmp_path / "parts" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
