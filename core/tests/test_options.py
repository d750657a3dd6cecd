"""Typed options: every conversion of a raw value, every bound, and what a refusal says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import sft
from sft.foreign_text import quoted
from sft.options import convert, options_of


@dataclass
class Sample:
    flag: bool = sft.option(False, "a switch")
    maybe_flag: bool | None = sft.option(None, "a switch that may be unset")
    count: int = sft.option(4, "a number of things", minimum=1)
    limit: int | None = sft.option(None, "a number that may be unset", minimum=1)
    rate: float = sft.option(0.5, "a rate", minimum=0, maximum=1)
    scale: float = sft.option(1.0, "a factor", above=0)
    half_open: float = sft.option(1.0, "a share", above=0, maximum=1)
    free: int = sft.option(0, "any whole number")
    loose: float = sft.option(0.0, "any number")
    place: str | None = sft.option(None, "a folder", is_path=True)
    text: str = sft.option("", "any text")
    name: str | None = sft.option(None, "text that may be unset")
    shape: str = sft.option("linear", "a shape", choices=("linear", "cosine"))
    parts: list[str] = sft.option([], "some names")
    file: str | None = sft.option(None, "a file, or none", none_is_text=True)


OPTIONS = options_of(Sample)


def refusal(name: str, value: Any) -> str:
    with pytest.raises(sft.UsageError) as caught:
        convert(OPTIONS[name], value)
    return str(caught.value)


@pytest.mark.parametrize("value", [True, "true", "True", "1", "yes", "on", "ON"])
def test_true_is_written_in_these_ways(value: Any) -> None:
    assert convert(OPTIONS["flag"], value) is True


@pytest.mark.parametrize("value", [False, "false", "FALSE", "0", "no", "off"])
def test_false_is_written_in_these_ways(value: Any) -> None:
    assert convert(OPTIONS["flag"], value) is False


@pytest.mark.parametrize("value", ["maybe", "", "2", 1, 0, None, [True]])
def test_anything_else_is_no_switch(value: Any) -> None:
    assert refusal("flag", value) == f"flag: expected true or false, got {value!r}."


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, 7), ("7", 7), ("1e3", 1000), (1e3, 1000), (2.0, 2), ("+5", 5), (" 5 ", 5), ("-5", -5), ("2.0", 2)],
)
def test_whole_numbers(value: Any, expected: int) -> None:
    converted = convert(OPTIONS["free"], value)
    assert converted == expected
    assert type(converted) is int


@pytest.mark.parametrize("value", [2**53 + 1, str(2**53 + 1), str(-(2**53) - 1)])
def test_a_whole_number_that_a_double_cannot_hold_stays_exact(value: Any) -> None:
    assert convert(OPTIONS["free"], value) == int(value)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        "1.5",
        "seven",
        "",
        True,
        False,
        None,
        "nan",
        float("inf"),
        "1e400",
        pytest.param(10**400, id="huge"),
        [1],
        {},
    ],
)
def test_what_is_no_whole_number(value: Any) -> None:
    assert refusal("free", value) == f"free: expected a whole number, got {quoted(value)}."


@pytest.mark.parametrize("value", [2**63, str(2**63), -(2**63), "9" * 300])
def test_a_whole_number_that_no_int64_holds(value: Any) -> None:
    assert refusal("free", value).startswith(f"free: whole numbers here go up to {2**63 - 1}, got ")


@pytest.mark.parametrize("value", ["1e39", 1e300, "1e-39", 1e-300, "-1e308"])
def test_a_number_that_no_float32_holds(value: Any) -> None:
    """Where paddle computes it would be infinite, or 0."""
    message = refusal("loose", value)
    assert message.startswith(
        "loose: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold"
    )


def test_numbers_at_the_bounds_of_float32() -> None:
    for value in (float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), 0.0):
        assert convert(OPTIONS["loose"], value) == value


@pytest.mark.parametrize("value", ["a\0b", "~nosuchuser/x", "a" * 5000, "a\ud800"])
def test_a_path_that_no_file_can_have(value: str) -> None:
    assert refusal("place", value).startswith("place: ")
    assert convert(OPTIONS["place"], "not/there") == "not/there"


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal("free", "x" * 100_000)) < 300


@pytest.mark.parametrize(
    ("value", "expected"), [("3e-4", 3e-4), (3e-4, 3e-4), ("0.25", 0.25), (1, 1.0), ("1", 1.0), ("1e-8", 1e-8)]
)
def test_numbers(value: Any, expected: float) -> None:
    converted = convert(OPTIONS["rate"], value)
    assert converted == expected
    assert type(converted) is float


@pytest.mark.parametrize("value", ["fast", "", True, None, "nan", float("nan"), "inf", [0.5]])
def test_what_is_no_number(value: Any) -> None:
    assert refusal("rate", value) == f"rate: expected a number of at least 0 and at most 1, got {value!r}."


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count: expected a whole number of at least 1, got 0."),
        ("count", "-3", "count: expected a whole number of at least 1, got '-3'."),
        ("limit", 0, "limit: expected a whole number of at least 1, or none, got 0."),
        ("rate", -0.1, "rate: expected a number of at least 0 and at most 1, got -0.1."),
        ("rate", "1.01", "rate: expected a number of at least 0 and at most 1, got '1.01'."),
        ("scale", 0, "scale: expected a number above 0, got 0."),
        ("half_open", 0.0, "half_open: expected a number above 0 and at most 1, got 0.0."),
        ("half_open", 2, "half_open: expected a number above 0 and at most 1, got 2."),
    ],
)
def test_out_of_bounds_names_setting_value_and_bounds(name: str, value: Any, message: str) -> None:
    assert refusal(name, value) == message


@pytest.mark.parametrize(
    ("name", "value"), [("count", 1), ("rate", 0), ("rate", 1), ("scale", 1e-30), ("half_open", 1), ("limit", 1)]
)
def test_bounds_themselves_are_accepted(name: str, value: Any) -> None:
    assert convert(OPTIONS[name], value) == value


def test_choices() -> None:
    assert convert(OPTIONS["shape"], "cosine") == "cosine"
    assert refusal("shape", "square") == "shape: expected one of linear, cosine, got 'square'."


@pytest.mark.parametrize("value", [3, True, None, ["a"]])
def test_text_is_text(value: Any) -> None:
    assert refusal("text", value) == f"text: expected text, got {value!r}."


def test_text_is_kept_as_it_is() -> None:
    assert convert(OPTIONS["text"], " Two words ") == " Two words "
    assert convert(OPTIONS["text"], "none") == "none"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" q_proj , v_proj, ", ["q_proj", "v_proj"]),
        (["q_proj", "a,b"], ["q_proj", "a,b"]),
        ("", []),
        ([], []),
    ],
)
def test_lists(value: Any, expected: list[str]) -> None:
    assert convert(OPTIONS["parts"], value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (r".*\.\d{1,2}\..*", [r".*\.\d{1,2}\..*"]),
        (r"q_proj, .*\.\d{1,2}\.v_proj ,o_proj", ["q_proj", r".*\.\d{1,2}\.v_proj", "o_proj"]),
        (r"(a{1,2}|b,c),[x,y],d", ["(a{1,2}|b,c)", "[x,y]", "d"]),
        (r"[({,],a", ["[({,]", "a"]),
        (r"a\(,b\\,c\,d", [r"a\(", r"b\\", r"c\,d"]),
        (r"a),b}", ["a)", "b}"]),
        ("(a,b", ["(a,b"]),
        ('["q_proj", ".*{1,2}"]', ["q_proj", ".*{1,2}"]),
        ("[]", []),
        (' ["a"] ', ["a"]),
        ("[qk]_proj,v", ["[qk]_proj", "v"]),
    ],
)
def test_commas_of_regular_expressions_divide_nothing_and_json_is_read(value: str, expected: list[str]) -> None:
    assert convert(OPTIONS["parts"], value) == expected


@pytest.mark.parametrize("value", ['["a", 1]', "[[]]", "[null]"])
def test_a_json_list_of_something_else(value: str) -> None:
    assert "expected a list" in refusal("parts", value)


@pytest.mark.parametrize("value", [[1, 2], 3, None, {"q_proj": True}])
def test_what_is_no_list_of_names(value: Any) -> None:
    assert refusal("parts", value) == f"parts: expected a list (JSON, or with commas), got {value!r}."


@pytest.mark.parametrize("name", ["limit", "maybe_flag", "name"])
@pytest.mark.parametrize("value", [None, "none", "None", "null", ""])
def test_unset(name: str, value: Any) -> None:
    assert convert(OPTIONS[name], value) is None


@pytest.mark.parametrize(
    ("value", "expected"), [("none", "none"), ("None", "None"), ("null", None), ("", None), (None, None)]
)
def test_none_may_be_a_value_of_its_own(value: Any, expected: Any) -> None:
    assert convert(OPTIONS["file"], value) == expected


def test_what_may_be_unset_may_also_be_set() -> None:
    assert convert(OPTIONS["limit"], "3") == 3
    assert convert(OPTIONS["maybe_flag"], "false") is False
    assert convert(OPTIONS["name"], "auto") == "auto"


def test_an_unset_default_is_still_typed() -> None:
    assert refusal("limit", "three") == "limit: expected a whole number of at least 1, or none, got 'three'."
    assert refusal("maybe_flag", "three") == "maybe_flag: expected true or false, or none, got 'three'."
    assert refusal("name", 3) == "name: expected text, or none, got 3."


def test_options_are_read_from_the_dataclass() -> None:
    assert list(OPTIONS)[:3] == ["flag", "maybe_flag", "count"]
    assert OPTIONS["count"].help == "a number of things"
    assert OPTIONS["count"].default == 4
    assert OPTIONS["flag"].is_flag
    assert OPTIONS["maybe_flag"].is_flag
    assert OPTIONS["parts"].is_list
    assert OPTIONS["parts"].default == []
    assert not OPTIONS["text"].is_list


def test_a_list_default_is_not_shared() -> None:
    Sample().parts.append("q_proj")
    assert Sample().parts == []
