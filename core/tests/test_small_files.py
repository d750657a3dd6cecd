"""Small files that strangers wrote: no plain file, too large, not text, not JSON; and regular expressions of theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sft
from sft import small_files
from sft.models.reals import check_reals
from sft.patterns import matches
from sft.small_files import check_path, is_there, read_bytes, read_json, read_object, read_text


def test_what_is_no_plain_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, what in (("pipe", "a named pipe"), ("folder", "a folder"), ("zero", "a device")):
        with pytest.raises(sft.UsageError, match=f"{name} is no file that can be read, but {what}; copy it again"):
            read_bytes(tmp_path / name)
    for name, why in (
        ("loop", "symbolic links"),
        ("missing", "No such file"),
        ("a\0b", "null"),
        ("a" * 300, "too long"),
    ):
        with pytest.raises(sft.UsageError, match=f"cannot be read .*{why}"):
            read_bytes(tmp_path / name)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "LARGEST", 10)
    (tmp_path / "f").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "f") == b"0123456789"
    (tmp_path / "f").write_bytes(b"01234567890")
    with pytest.raises(sft.UsageError, match="has 11 bytes, and at most 10 are read"):
        read_bytes(tmp_path / "f")


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text(path) == '{"a": 1}'
    assert read_object(path) == {"a": 1}
    for content, why in (
        (b"\xff", "is not UTF-8 text"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON .it is nested too deep."),
        (b"9" * 5000, "is not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(sft.UsageError, match=why):
            read_json(path)
    path.write_bytes(b"[1]")
    with pytest.raises(sft.UsageError, match="must hold one JSON object, and holds a list"):
        read_object(path)


def test_files_are_read_by_a_process_that_may_open_few_more() -> None:
    """Python looks for the module of an encoding when it is first used, and may then say that there is none."""
    program = "import sys, sft.data.sources; sys.exit('encodings.utf_8_sig' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_whether_anything_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert is_there(tmp_path / "link")
    assert not is_there(tmp_path / "missing")
    assert not is_there(tmp_path / "missing" / "too")
    with pytest.raises(sft.UsageError, match="cannot be read"):
        is_there(tmp_path / "a\0b")


def test_paths_that_are_not_there_are_fine(tmp_path: Path) -> None:
    check_path("x", str(tmp_path / "missing" / "too"))
    check_path("x", "~/missing")


# --- regular expressions ------------------------------------------------------------------------------------

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        ".*q_proj",
        ".*[qk]_proj",
        r".*\.\d+\..*",
        "(?i).*Q_PROJ",
        "model|.*proj",
        r"[\w.]+",
        ".*(?<!k)_proj",
        "q_proj",
        "",
    ],
)
def test_expressions_match_as_pythons_do(pattern: str) -> None:
    assert matches(pattern, NAME, "Target") is (re.fullmatch(pattern, NAME) is not None)


def test_an_expression_that_takes_too_long() -> None:
    began = time.monotonic()
    with pytest.raises(sft.UsageError, match=r"^Target '\(\?:.*' takes too long to match model\.layers"):
        matches("(?:.|..|...)*(?:.|..|...)*[A-C]", NAME, "Target")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{99999999999999999999}", "(" * 10_000 + ")" * 10_000, "(?P<a>x)(?P=b)"]
)
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(sft.UsageError, match=r"^Target .* is not a valid regular expression"):
        matches(pattern, NAME, "Target")


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_real_numbers_are_weights(dtype: str) -> None:
    import ml_dtypes

    values = np.random.default_rng(0).standard_normal((700, 500)).astype(getattr(ml_dtypes, dtype, dtype))
    for array in (values, values.T, values[:, 3:], values[0], values.reshape(7, 100, 500), values[:0], values[0, 0]):
        check_reals(np.asarray(array), "t")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("place", [(0, 0), (350, 257), (-1, -1)])
def test_one_value_that_is_not_finite(dtype: str, value: float, place: tuple[int, int]) -> None:
    import ml_dtypes

    array = np.ones((700, 500), getattr(ml_dtypes, dtype, dtype))
    with np.errstate(over="ignore"):
        array[place] = value
    for view in (array, array.T, array.reshape(7, 100, 500), array.reshape(-1)):
        with pytest.raises(sft.UsageError, match=r"^t has values that are not finite"):
            check_reals(view, "t")


def test_finite_values_whose_sum_is_not() -> None:
    check_reals(np.full(8, 3e38, np.float32), "t")
    check_reals(np.full(8, 65504, np.float16), "t")


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "uint32", "bool", "complex64", "float8_e4m3fn"])
def test_what_holds_no_real_numbers(dtype: str) -> None:
    import ml_dtypes

    array = np.ones(3, getattr(ml_dtypes, dtype, dtype))
    with pytest.raises(sft.UsageError, match=f"^t holds {dtype} and no real numbers of 16 bits or more"):
        check_reals(array, "t")
