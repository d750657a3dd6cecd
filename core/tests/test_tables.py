"""CSV and parquet: the records that JSON would hold, and where a wrong one stands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sft
from sft import hookspecs
from sft.data.finding import find_files
from sft.data.formats import Formats
from sft.data.sources import Record, read
from sft.plugins.registry import Plugins


def records(path: Path, content: str | bytes | None = None) -> list[Record]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read([path]))


def refusal(path: Path, content: str | bytes | None = None) -> str:
    with pytest.raises(sft.UsageError) as caught:
        records(path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}")
    return message.removeprefix(f"{path}")


def turns(path: Path) -> list[list[sft.Turn]]:
    plugins = Plugins.load([], hookspecs)
    plugins.start({})
    formats = Formats(plugins)
    return [list(formats.turns(record)) for record in read([path])]


# --- CSV ----------------------------------------------------------------------------------------------------


def test_rows_by_the_names_of_the_first(tmp_path: Path) -> None:
    found = records(tmp_path / "train.csv", "src,tgt,id\na,b,1\n你好,世界,\n")
    assert [record.value for record in found] == [
        {"src": "a", "tgt": "b", "id": "1"},
        {"src": "你好", "tgt": "世界", "id": ""},
    ]
    assert str(found[1].place) == f"{tmp_path / 'train.csv'}, line 3"


@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path, start: str, end: str) -> None:
    text = (start + "src,tgt\na,b\n\nc,d").replace("\n", end)
    found = records(tmp_path / "train.csv", text)
    first = 2 + start.count("\n")
    assert [(r.line, r.value["src"]) for r in found] == [(first, "a"), (first + 2, "c")]


def test_quotes_commas_and_line_ends_in_a_text(tmp_path: Path) -> None:
    rows = [['say "hi", please', "one\ntwo\r\nthree"], ["x" * 200_000, " y "]]
    path = tmp_path / "train.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["src", "tgt"], *rows])
    found = records(path)
    assert [list(record.value.values()) for record in found] == rows
    assert [record.line for record in found] == [2, 5]  # where each begins


def test_one_column(tmp_path: Path) -> None:
    assert [r.value for r in records(tmp_path / "train.csv", "text\na\n")] == [{"text": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is empty; it needs at least a row of names and one of texts."),
        ("src,tgt\n", " is empty; it needs at least a row of names and one of texts."),
        ("src,tgt\na,b\nc\n", ", line 3 has 1 cells and the header 2; put texts with commas"),
        ("src,tgt\na,b\n\nc,d,e\n", ", line 4 has 3 cells and the header 2; put texts with commas"),
        ("src,src\na,b\n", ", line 1 names the column 'src' twice; the header must name each once."),
        ('src,tgt\n"a"b,c\n', ", line 2 is not CSV ("),
        ('src,tgt\na,b\nc,"d\n', ", line 3 is not CSV ("),
        (b"src,tgt\na,b\n\xe9,c\n", ", line 3 is not UTF-8 text ("),
    ],
)
def test_what_is_no_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path / "train.csv", content).startswith(message)


def test_the_formats_of_csv_are_those_of_json(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("instruction,input,output\nDo,,Done\nDo,this,Done\n")
    assert [conversation[0].content for conversation in turns(path)] == ["Do", "Do\nthis"]
    path.write_text("src,tgt\na,b\nc,\n")
    with pytest.raises(sft.UsageError, match=r'train\.csv, line 3: "tgt" is empty; remove the record'):
        turns(path)
    path.write_text("src;tgt\na;b\n")
    with pytest.raises(sft.UsageError, match=r"train\.csv, line 2: the record is in no known format \(its keys: src;t"):
        turns(path)


# --- parquet ------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, **settings), path)
    return path


TALK = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "😀"}],
]


def test_nested_columns_are_what_json_lines_hold(tmp_path: Path) -> None:
    rows = [{"id": number, "messages": [*TALK[0], *TALK[1]]} for number in range(600)]  # more than are read at a time
    parquet(tmp_path / "train.parquet", rows)
    (tmp_path / "train.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = records(tmp_path / "train.parquet")
    assert [record.value["id"] for record in found] == list(range(600))
    assert str(found[599].place) == f"{tmp_path / 'train.parquet'}, row 600"
    assert turns(tmp_path / "train.parquet") == turns(tmp_path / "train.json")
    assert [turn.trains for turn in turns(tmp_path / "train.parquet")[0]] == [False, False, False, True]


def test_arguments_of_a_call_do_not_get_the_names_of_others(tmp_path: Path) -> None:
    """A nested column has the names of all rows in each row; JSON lines say what each call has."""
    calls = [{"name": "f", "arguments": {"x": 3}}, {"name": "g", "arguments": {"y": [{"z": "a"}, {"w": 1}]}}]
    rows = [{"messages": [TALK[0][0], {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    parquet(tmp_path / "train.parquet", rows)
    (tmp_path / "train.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert turns(tmp_path / "train.parquet") == turns(tmp_path / "train.json")


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_of_every_kind(tmp_path: Path, text: pa.DataType) -> None:
    schema = pa.schema([("src", text), ("tgt", text), ("score", pa.float64())])
    parquet(tmp_path / "train.parquet", [{"src": "a", "tgt": "b"}, {"src": "a", "tgt": "c"}], schema=schema)
    assert [conversation[1].content for conversation in turns(tmp_path / "train.parquet")] == ["b", "c"]


def test_lists_of_turns_and_absent_inputs(tmp_path: Path) -> None:
    parquet(tmp_path / "1.parquet", [{"src": ["a", "c"], "tgt": ["b", "d"]}])
    assert [turn.content for turn in turns(tmp_path / "1.parquet")[0]] == ["a", "b", "c", "d"]
    parquet(tmp_path / "2.parquet", [{"instruction": "a", "input": None, "output": "b"}])
    assert [turn.content for turn in turns(tmp_path / "2.parquet")[0]] == ["a", "b"]


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [{"src": "a", "tgt": "b"}] * 300 + [{"src": "a", "tgt": None}])
    with pytest.raises(sft.UsageError, match=r'train\.parquet, row 301: "tgt" must be text or a list of texts, not N'):
        turns(path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    data = pa.array([b"a"] * 5 + [b"\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"src": data, "tgt": data}), tmp_path / "train.parquet")
    assert refusal(tmp_path / "train.parquet").startswith(", row 6 is not UTF-8 text (")


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"src": "a"}' * 20])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    assert refusal(tmp_path / "train.parquet", content).startswith(", row 1 cannot be read as parquet (")


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [], schema=pa.schema([("src", pa.string())]))
    assert refusal(path) == " is empty; it needs at least one row."


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [{"src": "a" * number, "tgt": "b"} for number in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert ", row 1 cannot be read as parquet (" in refusal(path)
    path.write_bytes(content[:100] + b"\0" * 400 + content[500:])  # its end, which is read first, is whole
    assert ", row 1 cannot be read as parquet (" in refusal(path)


# --- which files --------------------------------------------------------------------------------------------


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


@pytest.mark.parametrize(
    ("names", "train", "dev"),
    [
        (["train.csv", "dev.csv"], ["train.csv"], ["dev.csv"]),
        (["train.parquet", "dev.json"], ["train.parquet"], ["dev.json"]),
        (["train/b.parquet", "train/a.parquet", "train/._a.parquet"], ["train/a.parquet", "train/b.parquet"], []),
        (
            ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "dev-00000-of-00001.parquet"],
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            ["dev-00000-of-00001.parquet"],
        ),
    ],
)
def test_splits_of_tables(tmp_path: Path, names: list[str], train: list[str], dev: list[str]) -> None:
    put(tmp_path, *names)
    for split, expected in (("train", train), ("dev", dev)):
        assert [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, split)] == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.json", "train.csv"], r"train\.json and train\.csv both exist; keep one of them"),
        (["train.csv", "train/1.csv"], r"train\.csv and .*train/ both hold train data; keep one of them"),
        (["train.csv", "train-0-of-1.csv"], r"train\.csv and train-\*-of-\* both hold train data; keep one of them"),
        (["train/1.json", "train/2.parquet"], r"1\.json and 2\.parquet are files of different kinds; keep one kind"),
    ],
)
def test_two_kinds_side_by_side_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(sft.UsageError, match=message):
        find_files(tmp_path, "train")
