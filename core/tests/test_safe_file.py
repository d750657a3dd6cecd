"""Reading from a safetensors file: any part of any type, and no page of it stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import sft
from sft.models.safe_file import SafeFile
from sft.tensor_files import read_tensors

WHERE: tuple[Any, ...] = (
    (),
    *[(slice(1, 2), slice(2, 5), slice(None)), (slice(1, 3), slice(None), slice(0, 6))],
    *[(slice(2, 3), slice(3, 4), slice(1, 4)), (slice(0, 2), slice(1, 3), slice(None))],
    *[(slice(None), slice(None), slice(2, 3)), (slice(1, 1), slice(None), slice(None))],
)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_])
def test_a_part_is_what_it_is_in_the_tensor(tmp_path: Path, dtype: str) -> None:
    tensors = {
        name: (np.arange(3 * 5 * 6).reshape(3, 5, 6) + shift).astype(dtype) for name, shift in (("a", 0), ("b", 7))
    }
    tensors["scalar"] = np.array(1, dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = SafeFile(tmp_path / "model.safetensors")
    assert sorted(file) == sorted(tensors)
    for where in WHERE:
        found = file.read("b", where)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, tensors["b"][where])
    assert file.read("scalar") == tensors["scalar"]
    assert file.shape("scalar") == []


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [200, 1 << 20])
def test_a_tensor_is_read_to_where_it_belongs(
    paddle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, target: str, part: int
) -> None:
    """As it lies in the file, turned, and in a place with other things beside it."""
    from sft import arrays

    monkeypatch.setattr(arrays, "PART", part)
    values = (50 * np.random.default_rng(0).standard_normal((83, 71))).astype(stored)
    save_file({"other": np.ones(3, np.int8), "a": values, "line": values[0]}, tmp_path / "model.safetensors")
    file, expected = SafeFile(tmp_path / "model.safetensors"), values.astype(np.float32).astype(target)
    straight, turned, beside = np.empty((83, 71), target), np.empty((71, 83), target), np.zeros((83, 90), target)
    line = np.empty(71, target)
    for name, place in (("a", straight), ("a", turned.T), ("a", beside[:, :71]), ("line", line)):
        file.read_onto(name, place)
        np.testing.assert_array_equal(place, expected if name == "a" else expected[0])
    assert not beside[:, 71:].any()


def mapped() -> int:
    """KiB of files that are in the memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


def test_no_page_of_the_file_stays(tmp_path: Path) -> None:
    save_file({str(one): np.ones((1024, 1024), np.float32) for one in range(12)}, tmp_path / "model.safetensors")
    file = SafeFile(tmp_path / "model.safetensors")
    before = mapped()
    for name in file:
        assert file.read(name)[-1, -1] == 1
    assert mapped() - before < 8 << 10  # of 48 MiB


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(64, np.float32)}, path)
    file = SafeFile(path)
    with path.open("r+b") as shortened:
        shortened.truncate(path.stat().st_size - 8)
    with pytest.raises(sft.UsageError, match=r"model\.safetensors has become shorter"):
        file.read("a")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_of_an_adapter_may_be_of_any_real_type(tmp_path: Path, dtype: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))
    save_file({"a": values}, tmp_path / "adapter_model.safetensors")
    found = read_tensors(tmp_path / "adapter_model.safetensors")["a"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
