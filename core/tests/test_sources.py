"""Sources: which files of a data set are read, which records they hold, and where a wrong one stands."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.data import sources
from sft.data.finding import find_files, unread
from sft.data.sources import Passing, read, size_of

LINE = '{"src": "a", "tgt": "b"}'


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE + "\n", encoding="utf-8")


def found(folder: Path, split: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder, split)]


# --- which files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "train", "dev"),
    [
        (["train.json"], ["train.json"], []),
        (["train.jsonl"], ["train.jsonl"], []),
        (["train.json", "dev.json"], ["train.json"], ["dev.json"]),
        (["train.json", "dev.jsonl"], ["train.json"], ["dev.jsonl"]),
        (["train/b.json", "train/a.jsonl", "train/10.json"], ["train/10.json", "train/a.jsonl", "train/b.json"], []),
        (["train.json", "dev/2.json", "dev/1.json"], ["train.json"], ["dev/1.json", "dev/2.json"]),
        (["train.json", "test.json", "train/readme.md", "notes.txt"], ["train.json"], []),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, names: list[str], train: list[str], dev: list[str]) -> None:
    put(tmp_path, *names)
    assert found(tmp_path, "train") == train
    assert found(tmp_path, "dev") == dev


@pytest.mark.parametrize("name", ["any.json", "any.jsonl", "data.txt"])
def test_one_file_is_the_training_data(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    assert find_files(tmp_path / name, "train") == [tmp_path / name]
    assert find_files(tmp_path / name, "dev") == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.json", "train.jsonl"], r"train\.json and train\.jsonl both exist; keep one of them"),
        (["train.json", "train/1.json"], r"train\.json and .*train/ both hold train data; keep one of them"),
        (["dev.json"], "has no training data; it needs train.json, train.jsonl or train/"),
        (["train/readme.md"], "has no training data; it needs train.json, train.jsonl or train/"),
    ],
)
def test_unclear_folders_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(sft.UsageError, match=message):
        find_files(tmp_path, "train")


def test_a_doubled_dev_split_is_refused_too(tmp_path: Path) -> None:
    put(tmp_path, "train.json", "dev.json", "dev/1.json")
    with pytest.raises(sft.UsageError, match="both hold dev data"):
        find_files(tmp_path, "dev")


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"^Data .*nowhere does not exist; give dataset_name_or_path"):
        find_files(tmp_path / "nowhere", "train")


# --- which records ------------------------------------------------------------------------------------------


def records(folder: Path, content: str | bytes) -> list[tuple[int, Any]]:
    """Line and value of each record of a file with this content."""
    path = folder / "train.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(record.line, record.value) for record in read([path])]


def refusal(folder: Path, content: str | bytes) -> str:
    """What a file with this content is refused with, without the folder's name."""
    with pytest.raises(sft.UsageError) as caught:
        records(folder, content)
    message = str(caught.value)
    assert message.startswith(f"{folder}/train.json")
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def test_one_object_a_line(tmp_path: Path) -> None:
    assert records(tmp_path, '{"a": 1}\n{"b": "你好"}\n') == [(1, {"a": 1}), (2, {"b": "你好"})]


@pytest.mark.parametrize(
    "content",
    [
        '\n\n{"a": 1}\n  \n\t\n{"b": 2}',
        '\r\n\r\n{"a": 1}\r\n\r\n\r\n{"b": 2}\r\n',
        '\ufeff\n\n{"a": 1}\n\n\n{"b": 2}\n\n',
    ],
)
def test_blank_lines_line_ends_and_a_byte_order_mark(tmp_path: Path, content: str) -> None:
    assert records(tmp_path, content) == [(3, {"a": 1}), (6, {"b": 2})]


def test_a_byte_order_mark_before_the_first_record(tmp_path: Path) -> None:
    assert records(tmp_path, b'\xef\xbb\xbf{"a": 1}\n') == [(1, {"a": 1})]
    assert records(tmp_path, b'\xef\xbb\xbf[{"a": 1}]') == [(1, {"a": 1})]


def test_other_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    assert records(tmp_path, '{"a": "x\u2028y\x85z"}\n{"b": 2}\n') == [(1, {"a": "x\u2028y\x85z"}), (2, {"b": 2})]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array(tmp_path: Path, indent: int | None) -> None:
    values = [{"src": "a ] b", "tgt": ["[1]", "c"]}, {"x": {}}, {"src": "\\n\n"}]
    assert [value for _, value in records(tmp_path, json.dumps(values, indent=indent))] == values


def test_lines_of_an_array(tmp_path: Path) -> None:
    assert records(tmp_path, '[\n{"a": 1},\n\n  {"b":\n 2}, {"c": 3}\n]\n') == [
        (2, {"a": 1}),
        (4, {"b": 2}),
        (5, {"c": 3}),
    ]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "2.jsonl").write_text('[{"a": 3}]')
    found = list(read([tmp_path / "1.json", tmp_path / "2.jsonl"]))
    assert [record.value["a"] for record in found] == [1, 2, 3]
    assert str(found[1].place) == f"{tmp_path / '1.json'}, line 2"


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"a": 1}\nbroken\n')
    stream: Iterable[Any] = read([tmp_path / "train.json"])
    assert next(iter(stream)).value == {"a": 1}


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "[]", " [ ] \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    assert refusal(tmp_path, content) == "train.json is empty; it needs at least one JSON object on a line."


def test_one_empty_file_of_several(tmp_path: Path) -> None:
    put(tmp_path, "1.json")
    (tmp_path / "2.json").write_text("")
    with pytest.raises(sft.UsageError, match=r"2\.json is empty"):
        list(read([tmp_path / "1.json", tmp_path / "2.json"]))


def test_line_17_is_not_json(tmp_path: Path) -> None:
    content = f"{LINE}\n" * 16 + '{"src": "a", "tgt": }\n' + f"{LINE}\n"
    assert refusal(tmp_path, content) == (
        "train.json, line 17 is not JSON (Expecting value at column 21); each line must hold one JSON object."
    )


def test_a_string_without_an_end(tmp_path: Path) -> None:
    assert "(Unterminated string starting at column 14);" in refusal(tmp_path, '{"src": "a", "tgt\n')


def test_blank_lines_count(tmp_path: Path) -> None:
    assert refusal(tmp_path, f"\n{LINE}\n\n\n{{").startswith("train.json, line 5 is not JSON (")


@pytest.mark.parametrize("line", [LINE + LINE, LINE + ",", "{'src': 'a'}"])
def test_a_line_with_more_or_less_than_an_object(tmp_path: Path, line: str) -> None:
    assert refusal(tmp_path, f"{LINE}\n{line}\n").startswith("train.json, line 2 is not JSON (")


@pytest.mark.parametrize(
    ("line", "kind"), [('["a", "b"]', "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")]
)
def test_a_line_that_is_no_object(tmp_path: Path, line: str, kind: str) -> None:
    message = refusal(tmp_path, f"{LINE}\n{line}\n")
    assert message == f'train.json, line 2 holds {kind}, not a JSON object like {{"src": …}}.'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[\n{LINE},\n3\n]", "train.json, line 3 (record 2) holds int, not a JSON object"),
        (f"[\n{LINE},\n{{]\n", "train.json, line 3 (record 2) is not JSON ("),
        (f"[\n{LINE},\n{LINE}\n", "train.json, line 4 (record 3) is not JSON ("),
        (f"[{LINE}]\n[{LINE}]\n", "train.json, line 2 is not JSON ("),
        (f"[\n{LINE}\n]\n\n{LINE}\n", "train.json, line 5 is not JSON ("),
    ],
)
def test_arrays_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    assert refusal(tmp_path, content).startswith(message)


@pytest.mark.parametrize("before", [1, 5000])
def test_not_utf8(tmp_path: Path, before: int) -> None:
    content = f"{LINE}\n".encode() * before + '{"src": "é"}\n'.encode("latin-1")
    assert refusal(tmp_path, content).startswith(f"train.json, line {before + 1} is not UTF-8 text (")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").mkdir()
    with pytest.raises(sft.UsageError, match=r"train\.json cannot be read \(Is a directory\)"):
        list(read([tmp_path / "train.json"]))


def test_the_column_of_an_unfinished_line_is_its_end(tmp_path: Path) -> None:
    """Not column 1 of the next line."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"src": "a", "tgt": "b"}\n{"src": ["a"\n')
    with pytest.raises(sft.UsageError, match=r"line 2 is not JSON \(Expecting ',' delimiter at column 13\)"):
        list(read([path]))


@pytest.mark.parametrize("separator", [", ", ",\n"])
def test_a_record_of_an_array_is_named_by_its_number(tmp_path: Path, separator: str) -> None:
    records = [{"src": "a", "tgt": "b"}, {"src": "a"}, {"src": "a", "tgt": "c"}]
    path = tmp_path / "train.json"
    path.write_text(f"[{separator.join(map(json.dumps, records))}]")
    line = 2 if "\n" in separator else 1
    assert [str(record.place) for record in read([path])][1] == f"{path}, line {line} (record 2)"


@pytest.mark.parametrize(
    "record", ['{"src": "a", "tgt": "b", "src": "c"}', '{"m": [{"src": "a", "src": "a"}], "tgt": 1}']
)
def test_a_name_that_stands_twice_in_a_record_is_refused(tmp_path: Path, record: str) -> None:
    """JSON readers take the last one in silence."""
    cause = 'cannot be read as JSON ("src" stands twice in one object); correct it.'
    assert refusal(tmp_path, f"{LINE}\n{record}\n") == f"train.json, line 2 {cause}"
    assert refusal(tmp_path, f"[{LINE}, {record}]") == f"train.json, line 1 (record 2) {cause}"


def test_what_has_been_read_ends_with_all_bytes(tmp_path: Path) -> None:
    """Of JSON lines, arrays and tables, so that a bar reaches its end and no further."""
    (tmp_path / "a.json").write_text(f"{LINE}\n" * 3000)
    (tmp_path / "b.json").write_text("[" + ",\n".join([LINE] * 50) + "]")
    (tmp_path / "c.csv").write_text("src,tgt\n" + "a,b\n" * 5000)
    files = sorted(tmp_path.iterdir())
    done = [record.done for record in read(files)]
    assert done == sorted(done)
    assert size_of(files) - 2 <= done[-1] <= size_of(files) == sum(len(path.read_bytes()) for path in files)
    assert done[1500] < done[2999] == (tmp_path / "a.json").stat().st_size


@pytest.mark.parametrize(
    "name", ["validation.json", "validation.parquet", "validation/1.jsonl", "validation-00000-of-00001.csv"]
)
def test_dev_data_may_be_called_validation(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / "train.json", tmp_path / name):
        path.parent.mkdir(exist_ok=True)
        path.write_text(LINE)
    assert find_files(tmp_path, "dev") == [tmp_path / name]
    assert unread(tmp_path, find_files(tmp_path, "dev")) == []


def test_what_looks_like_data_and_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("train.json", "dev.json", "validation.json", "test.jsonl", "eval.txt"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "1.csv").write_text("src,tgt")
    files = find_files(tmp_path, "dev")
    assert files == [tmp_path / "dev.json"]
    assert unread(tmp_path, files) == ["validation.json", "valid/1.csv", "test.jsonl"]


# --- records that are passed over ---------------------------------------------------------------------------


def test_lines_that_are_passed_over_are_not_even_taken_for_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_TOLD", 2)
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text('{"n": 0}\n\n{"n": broken\n{"n": 2}\n')
    two.write_text('no record\n{"n": 4}\n{"n": 5}\n')
    for number, expected in ((2, [2]), (3, []), (4, [])):
        told: list[int] = []
        found = read([one, two], Passing(number, told.append))
        for n in expected:
            assert next(found).value == {"n": n}
        if number < 4:
            with pytest.raises(sft.UsageError, match=r"2\.json, line 1 is not JSON"):
                next(found)
        else:
            assert [(record.value["n"], record.line) for record in found] == [(4, 2), (5, 3)]
        assert sum(told) == number
        assert max(told) == 2
    assert list(read([one, two], Passing(9))) == []


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_records_of_any_file_are_passed_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text('[{"n": "0"}, {"n": "1"}, {"n": "2"}]')
    elif path.suffix == ".csv":
        path.write_text("n\n0\n1\n2\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"n": ["0", "1", "2"]}), path)
    whole = list(read([path]))
    assert [record.value["n"] for record in whole] == ["0", "1", "2"]
    assert list(read([path], Passing(2))) == whole[2:]


def test_a_file_that_is_passed_over_whole_is_not_empty_and_an_empty_one_is(tmp_path: Path) -> None:
    full, empty = tmp_path / "1.json", tmp_path / "2.json"
    full.write_text('{"n": 0}\n')
    empty.write_text("\n")
    with pytest.raises(sft.UsageError, match=r"2\.json is empty"):
        list(read([full, empty], Passing(1)))
