"""What dataset_name_or_path may say, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sft
from sft.dataset_names import NamedSet, named_sets, schemes


def plain(value: Any) -> list[tuple[str, str, float | None]]:
    return [(one.path, one.name, one.weight) for one in named_sets(value)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data", [("data", "data", None)]),
        ("some/train.json", [("some/train.json", "train", None)]),
        ("a.json:0.7,b/:0.3", [("a.json", "a", 0.7), ("b/", "b", 0.3)]),
        ("a.json, b.jsonl", [("a.json", "a", None), ("b.jsonl", "b", None)]),
        ("x/a.json:2,y/a.json:1e-1", [("x/a.json", "a", 2.0), ("y/a.json", "a-2", 0.1)]),
        ("hf://owner/name@v1", [("hf://owner/name@v1", "name", None)]),
        ("hf://owner/name:1,a:3", [("hf://owner/name", "name", 1.0), ("a", "a", 3.0)]),
        ('["a:1", {"path": "b", "weight": 2, "name": "c"}]', [("a", "a", 1.0), ("b", "c", 2.0)]),
        ([{"path": Path("a:1,b")}], [("a:1,b", "a:1,b", None)]),
        (None, []),
    ],
)
def test_what_is_named(value: Any, expected: list[tuple[str, str, float | None]]) -> None:
    assert plain(value) == expected


def test_what_is_there_is_one_path_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b,c", "d"):
        (tmp_path / name).write_text("")
    assert plain("a:0.5") == [("a:0.5", "a:0.5", None)]
    assert plain("b,c") == [("b,c", "b,c", None)]
    assert plain("a:0.5:2,b,c:3,d:1") == [("a:0.5", "a:0.5", 2.0), ("b,c", "b,c", 3.0), ("d", "d", 1.0)]


@pytest.mark.parametrize(
    ("split", "train", "dev"),
    [
        (None, "train", "dev"),
        ("train_sft", "train_sft", None),
        ("dev", None, "dev"),
        ("validation", None, "validation"),
        ({"train": "train_sft", "dev": "test_sft"}, "train_sft", "test_sft"),
        ({"dev": "test"}, None, "test"),
    ],
)
def test_splits(split: Any, train: str | None, dev: str | None) -> None:
    (one,) = named_sets([{"path": "a", "split": split, "limit": 3, "format": "alpaca"}])
    assert one == NamedSet("a", "a", None, 3, "alpaca", train, dev)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the list is empty; name a data set."),
        ("a,,b", "data set 2: path must be a text that is not empty, not ''."),
        ("a:1,b", "b has no weight, and a has one; give all data sets a weight, or none."),
        ("a:1", "the weight of a does nothing, for it is the only data set to train on; leave it out."),
        ([{"path": "a"}, {"path": "b", "split": "dev", "weight": 1}], "the weight of b does nothing, for it is only"),
        ("a:0,b:1", "data set 1: weight must be a number above 0, not 0.0; leave a set out to drop it."),
        ([{"path": "a", "weight": True}, "b:1"], "data set 1: weight must be a number above 0, not True;"),
        ([{"path": "a", "weight": float("nan")}, "b:1"], "data set 1: weight must be a number above 0, not nan;"),
        ("a:1e400,b:1", "data set 1: weight must be from 1.2e-38 to 3.4e+38, not inf."),
        ([{"path": "a", "weight": 10**400}, "b:1"], "data set 1: weight must be from 1.2e-38 to 3.4e+38, not 1000"),
        ("a:1e-60,b:1", "data set 1: weight must be from 1.2e-38 to 3.4e+38, not 1e-60."),
        ([{"path": "a", "limit": 10**30}], "limit goes up to 9,223,372,036,854,775,807, not 1000"),
        ([{"path": "a", "limit": 0}], "limit must be a whole number of records from 1, not 0."),
        ([{"path": "a", "share": 1}], "has share; known are format, limit, name, path, split, weight."),
        ([{"weight": 1}], "has no path; say where the data is."),
        ([3], "data set 1 must be a path, or an object with path and weight, not 3."),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "two data sets are called x;"),
        ([{"path": "a", "split": "../b"}], "split must be the name of a split, or an object"),
        ([{"path": "a", "split": {"train": None}}], "split must be the name of a split, or an object"),
        ('["a"', "begins like a JSON list and is none"),
        ("[" * 100_000, "begins like a JSON list and is none (it is nested too deep)."),
        (3, "expected a path or a list of data sets, got 3."),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    with pytest.raises(sft.UsageError) as caught:
        named_sets(value)
    assert str(caught.value).startswith("dataset_name_or_path")
    assert message in str(caught.value)


def test_schemes() -> None:
    assert schemes("hf://a/b:1,other://c:2,d:3") == ["hf", "other"]
    assert schemes([{"path": "hf://a/b"}, "c"]) == ["hf"]
    assert schemes("a:1") == schemes(None) == schemes("data") == []
