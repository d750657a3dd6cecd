"""What a checkpoint's adapter file holds already is not written a second time, and comes back bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import needs
from sft.training.held_once import find_places, take
from sft.training.manifest import write_manifest

Train = Callable[..., sft.Summary]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_arrays_are_found_as_they_are_turned_and_at_either_end_of_longer_ones(dtype: Any) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "same": draw.normal(size=(4, 6)) * 100,
        "turned": draw.normal(size=(3, 5)) * 100,
        "longer": draw.normal(size=(2, 7)) * 100,
        "last": draw.normal(size=(2, 3)) * 100,
        "last and turned": draw.normal(size=(3, 2)) * 100,
        "longer and turned": draw.normal(size=(7, 2)) * 100,
        "vector": draw.normal(size=9) * 100,
        "scalar": np.asarray(7.0),
    }
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    adapter = {
        "x.same.weight": arrays["same"],
        "x.turned.weight": np.ascontiguousarray(arrays["turned"].T),
        "x.longer": np.concatenate([arrays["longer"], arrays["longer"] + arrays["longer"]], axis=0),
        "x.other": np.concatenate([arrays["longer and turned"].T, arrays["longer"]], axis=0),
        "x.ends": np.concatenate([arrays["last"] * 2, arrays["last"]], axis=0),
        "x.ends too": np.concatenate([arrays["last and turned"].T * 2, arrays["last and turned"].T], axis=1),
        "x.vector": arrays["vector"],
        "x.scalar": arrays["scalar"],
    }
    places = find_places(adapter, arrays)
    assert set(places) == set(arrays)
    for name, place in places.items():
        assert bits(take(adapter, place)) == bits(arrays[name])
        assert take(adapter, place).dtype == dtype


def test_of_tensors_that_are_alike_the_one_of_the_same_name_is_taken() -> None:
    """As of layers that have not learned yet, whose second matrices are all zero."""
    arrays = {f"layers.{number}.b": np.zeros((2, 3), np.float32) for number in range(12)}
    adapter = {f"x.{name}.weight": array.T for name, array in reversed(arrays.items())}
    places = find_places(adapter, arrays)
    assert {name: place[0] for name, place in places.items()} == {name: f"x.{name}.weight" for name in arrays}


def test_nothing_is_taken_for_what_it_is_not() -> None:
    """Zeros of the other sign, a last value that differs, another dtype, a shape that only begins alike."""
    adapter = {"a": np.asarray([0.0, 1.0], np.float32), "b": np.zeros((2, 2), np.float32)}
    arrays = {
        "sign": np.asarray([-0.0, 1.0], np.float32),
        "value": np.asarray([0.0, 2.0], np.float32),
        "dtype": np.asarray([0.0, 1.0], np.float64),
        "larger": np.zeros((2, 3), np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert find_places(adapter, arrays) == {}
    nan = np.asarray([np.nan, 1.0], np.float32)
    assert find_places({"nan": nan}, {"nan": nan.copy()}) == {"nan": ["nan", False, [2], False]}


SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(["lora"], marks=needs("lora"), id="lora"),
        pytest.param(["lora", "pissa"], marks=needs("pissa"), id="pissa"),
        pytest.param(["vera"], marks=needs("vera"), id="vera"),
    ],
)
def test_a_checkpoint_holds_what_trains_once(train: Train, tmp_path: Path, plugins: list[str]) -> None:
    """Nothing of an adapter lies beside its file; and a resumed run ends with the same bits."""
    train("whole", plugin=plugins, **SETTINGS)
    folder = tmp_path / "whole" / "checkpoint-2"
    assert not (folder / "trainer" / "trainable.safetensors").exists()
    assert not load_file(folder / "trainer" / "plugins.safetensors")
    train("resumed", plugin=plugins, resume_from_checkpoint=str(folder), **SETTINGS)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@needs("lora")
def test_what_the_adapter_changes_is_kept_beside_it(train: Train, tmp_path: Path) -> None:
    """By a plugin that writes another pair of the same product: the trained bits are not in the adapter's file."""

    class Shifted(sft.Plugin):
        name = "shifted"
        api_version = 1
        requires = ("lora",)

        @sft.hookimpl
        def lora_export(self, layer: Any) -> tuple[np.ndarray, np.ndarray]:
            return layer.lora_A.numpy() * np.float32(0.3), layer.lora_B.numpy() / np.float32(0.3)

    for name, more in (("whole", {}), ("resumed", {"resume_from_checkpoint": str(tmp_path / "whole/checkpoint-2")})):
        train(name, (Shifted,), plugin=["lora"], **SETTINGS, **more)
    kept = load_file(tmp_path / "whole" / "checkpoint-2" / "trainer" / "trainable.safetensors")
    assert kept
    assert all(np.any(value) for value in kept.values())
    name = "adapter_model.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@needs("lora")
def test_an_adapter_file_that_lacks_a_tensor_is_refused(train: Train, tmp_path: Path) -> None:
    train("out", plugin=["lora"], **SETTINGS)
    path = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    from safetensors import safe_open

    save_file({key: tensors[key] for key in tensors if key != lost}, path, safe_open(path, "numpy").metadata())
    write_manifest(path.parent)
    with pytest.raises(sft.UsageError, match=rf"{path.name} has no tensor '{lost}'; resume from another checkpoint"):
        train("again", plugin=["lora"], resume_from_checkpoint=str(path.parent), **SETTINGS)
