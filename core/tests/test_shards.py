"""Weight files: one or several with an index, streamed, in each layout; sizes as people write them; a full disk."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.models.shards import WeightFormat, parse_size, write_tensors

PICKLED = WeightFormat(layout="paddle", safe=False)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, shapes, dtypes and every bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


def test_a_small_limit_gives_shards_and_an_index_that_load(paddle: Any, models: Path, tmp_path: Path) -> None:
    from sft.models.loading import load_model, open_model
    from sft.models.saving import model_tensors

    case, limit = models / "llama-untied", 20_000
    source = open_model(case)
    total = write_tensors(
        tmp_path, model_tensors(load_model(source).named_parameters(), source), WeightFormat(shard_bytes=limit)
    )

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    held = {name: list(load_file(tmp_path / name)) for name in files}
    assert index["weight_map"] == {tensor: name for name, tensors in held.items() for tensor in tensors}
    original = tensors_of(case)
    assert index["metadata"]["total_size"] == total == sum(tensor.nbytes for tensor in original.values())
    for name in files:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / name).values()) <= limit
    assert_same_tensors(tensors_of(tmp_path), original)

    shutil.copy(case / "config.json", tmp_path)
    again = load_model(open_model(tmp_path))
    expected = {name: parameter.numpy() for name, parameter in load_model(source).named_parameters()}
    assert_same_tensors({name: parameter.numpy() for name, parameter in again.named_parameters()}, expected)


def test_a_tensor_beyond_the_limit_gets_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.float32), "large": np.ones(100, np.float32), "z": np.zeros(3, np.float32)}
    write_tensors(tmp_path, iter(tensors.items()), WeightFormat(shard_bytes=16))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [list(load_file(path)) for path in files] == [["a"], ["large"], ["z"]]


def test_one_shard_has_no_number_and_no_index(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}
    assert write_tensors(tmp_path, iter(tensors.items()), WeightFormat(shard_bytes=16)) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_are_written_while_tensors_still_stream(tmp_path: Path) -> None:
    """At most one shard is in memory: by the time a later tensor is asked for, earlier shards are files."""
    on_disk = []

    def stream() -> Any:
        for number in range(6):
            on_disk.append(len(list(tmp_path.glob("*.safetensors"))))
            yield str(number), np.full(4, number, np.float32)

    write_tensors(tmp_path, stream(), WeightFormat(shard_bytes=32))
    assert on_disk == [0, 0, 0, 1, 1, 2]


def test_pickled_shards_are_named_as_paddlenlp_names_them(paddle: Any, tmp_path: Path) -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, ml_dtypes.bfloat16), "c": np.ones(2, np.float16)}
    assert write_tensors(tmp_path, iter(tensors.items()), WeightFormat("paddle", False, 24)) == 36
    first, second = "model_state-00001-of-00002.pdparams", "model_state-00002-of-00002.pdparams"
    index = json.loads((tmp_path / "model_state.pdparams.index.json").read_text())
    assert index == {"metadata": {"total_size": 36}, "weight_map": {"a": first, "b": second, "c": second}}
    loaded = {**paddle.load(str(tmp_path / first)), **paddle.load(str(tmp_path / second))}
    assert {name: str(tensor.dtype) for name, tensor in loaded.items()} == {
        "a": "paddle.float32",
        "b": "paddle.bfloat16",
        "c": "paddle.float16",
    }
    assert loaded["b"].astype("float32").tolist() == [1.0] * 4


def test_one_pickled_file_has_no_number(paddle: Any, tmp_path: Path) -> None:
    write_tensors(tmp_path, iter([("a", np.arange(3, dtype=np.float32))]), PICKLED)
    assert [path.name for path in tmp_path.iterdir()] == ["model_state.pdparams"]
    assert paddle.load(str(tmp_path / "model_state.pdparams"))["a"].tolist() == [0, 1, 2]


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2_000_000_000),
        ("500mb", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("4GiB", 4 << 30),
        ("64KiB", 65536),
        ("10K", 10_000),
        ("1TB", 10**12),
        ("12345", 12345),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "0", "0GB", "two", "2 GB each", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(sft.UsageError, match="is no size; give something like 2GB"):
        parse_size(text)


# --- a full disk --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses what goes beyond, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", [WeightFormat(), WeightFormat("paddle"), PICKLED], ids=["hf", "paddle", "pdparams"])
def test_a_file_that_cannot_be_written_is_an_os_error_that_names_it(
    paddle: Any, tmp_path: Path, form: WeightFormat
) -> None:
    """``sft`` prints an OSError as one line."""
    tensors = {"a": np.zeros(100_000, np.float32)}
    with (
        files_no_larger_than(10_000),
        pytest.raises(OSError, match=r"part-00000\.\w+ could not be written: .*too large"),
    ):
        write_tensors(tmp_path, iter(tensors.items()), form)
