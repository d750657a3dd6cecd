"""Loading what one of several processes holds: parts of tensors are read, the rest is not, and all must be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.distributed.parts import (
    Part,
    is_elsewhere,
    mark_part,
    mark_stage,
    mark_sums,
    part_of,
    stage_of,
    whole_shape,
    whole_size,
)
from sft.models.families.known import FAMILIES
from sft.models.source import ModelFolder, Weights

GATE, DOWN, ELSEWHERE = "0.mlp.gate_proj", "0.mlp.down_proj", "1.mlp.up_proj"
"""Of a model of 32 inputs, 48 inner values: what is held in two parts, and what another process holds."""


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis", "count"), [((6,), 0, 3), ((4, 6), 1, 2), ((4, 6), 0, 4), ((4, 6), 1, 1)])
def test_parts_side_by_side_are_the_whole(shape: tuple[int, ...], axis: int, count: int) -> None:
    whole = np.arange(np.prod(shape)).reshape(shape)
    parts = [Part(shape, axis, index, count).read(whole.__getitem__) for index in range(count)]
    for part, expected in zip(parts, np.split(whole, count, axis), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_parts_of_matrices_that_lie_in_one_tensor() -> None:
    """Of each of them the same share, as of q, k and v in one matrix; what is written lands where it was read."""
    whole = np.arange(2 * 12).reshape(2, 12)
    parts = [Part((2, 12), 1, index, 2, fused=(8, 4)) for index in range(2)]
    expected = [np.concatenate([whole[:, :4], whole[:, 8:10]], 1), np.concatenate([whole[:, 4:8], whole[:, 10:]], 1)]
    written = np.zeros_like(whole)
    for part, values in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part.read(whole.__getitem__), values)
        assert part.local_shape == values.shape
        part.write(values, written)
    np.testing.assert_array_equal(written, whole)
    order = parts[0].order
    assert order is not None
    np.testing.assert_array_equal(np.concatenate(expected, 1)[:, order], whole)


def test_marks_say_what_the_whole_is(paddle: Any) -> None:
    plain, marked = paddle.zeros([2, 3]), paddle.zeros([2, 3])
    mark_part(marked, Part((2, 12), 1, 0, 4))
    mark_stage(marked, 3, here=False)
    assert (part_of(plain), whole_shape(plain), whole_size(plain), is_elsewhere(plain)) == (None, (2, 3), 6, False)
    assert (part_of(marked), whole_shape(marked), whole_size(marked)) == (Part((2, 12), 1, 0, 4), (2, 12), 24)
    assert (stage_of(plain), stage_of(marked), is_elsewhere(marked)) == (None, 3, True)


def test_a_layer_sums_over_those_who_divide_its_side(paddle: Any) -> None:
    layer, values = paddle.nn.Linear(2, 3), np.arange(3)
    assert sft.sum_over(layer, "in", values) is values
    mark_sums(layer, "in", lambda values: 2 * values)
    np.testing.assert_array_equal(sft.sum_over(layer, "in", values), [0, 2, 4])
    assert sft.sum_over(layer, "out", values) is values
    with pytest.raises(ValueError, match="not 'middle'"):
        sft.sum_over(layer, "middle", values)


# --- reading ------------------------------------------------------------------------------------------------


def as_safetensors(paddle: Any, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors")


def as_uint16(paddle: Any, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: tensor.view(np.uint16) for name, tensor in tensors.items()}, folder / "model.safetensors")


def as_pdparams(paddle: Any, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    state = {name: paddle.to_tensor(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    bits = {name: tensor.astype("bfloat16") for name, tensor in state.items()}
    paddle.save(
        state if "float32" in {str(t.dtype) for t in tensors.values()} else bits, str(folder / "model_state.pdparams")
    )


def as_shards(paddle: Any, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        *((write, np.float32) for write in (as_safetensors, as_pdparams, as_shards)),
        *((write, ml_dtypes.bfloat16) for write in (as_safetensors, as_uint16, as_pdparams, as_shards)),
    ],
)
def test_a_part_is_read_as_float32(paddle: Any, tmp_path: Path, write: Callable[..., None], dtype: Any) -> None:
    """Values that both types hold exactly."""
    tensors = {name: np.arange(24).reshape(4, 6).astype(dtype) + dtype(number) for number, name in enumerate("ab")}
    tensors["line"] = np.arange(5).astype(dtype)
    write(paddle, tmp_path, tensors)
    weights = Weights(ModelFolder(tmp_path, allow_pickle=True), FAMILIES["llama"])
    for name, where in [
        ("a", (slice(2, 4), slice(0, 6))),
        ("b", (slice(0, 4), slice(2, 4))),
        ("b", (slice(1, 2), slice(5, 6))),
        ("line", (slice(3, 5),)),
    ]:
        found = weights.read_part(name, where)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensors[name].astype(np.float32)[where])


# --- a model that is divided --------------------------------------------------------------------------------


def second_of_two(paddle: Any) -> Any:
    """A strategy that holds the second part of a Linear's outputs and of another's inputs, and not a third Linear."""
    from sft.distributed.whole import set_value
    from sft.training.strategy import SingleProcess

    class Second(SingleProcess):
        def divide(self, model: Any) -> None:
            for name, axis in ((GATE, 1), (DOWN, 0)):
                linear = self.linear(model, name)
                part = Part(tuple(linear.weight.shape), axis, 1, 2)
                mark_part(linear, part)
                mark_stage(linear, 1, here=True)
                with paddle.LazyGuard():
                    linear.weight = paddle.create_parameter(list(part.local_shape), "float32")
                mark_part(linear.weight, part)
            linear = self.linear(model, ELSEWHERE)
            mark_stage(linear, 0, here=False)
            mark_stage(linear.weight, 0, here=False)

        def linear(self, model: Any, name: str) -> Any:
            found = model.model.layers
            for step in name.split("."):
                found = found[int(step)] if step.isdecimal() else getattr(found, step)
            return found

        def store(self, parameter: Any, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
            part = part_of(parameter) or Part(tuple(parameter.shape), 0, 0, 1)
            set_value(parameter, part.read(read))

    return Second()


def load(paddle: Any, folder: Path, quantizer: Any = None) -> tuple[Any, Any]:
    from sft.models.loading import load_model, open_model

    strategy = second_of_two(paddle)
    return load_model(open_model(folder), quantizer, strategy=strategy), strategy


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Which tensors are read as a whole, and which in part."""
    names: dict[str, list[str]] = {"whole": [], "part": []}
    own = Weights.read_stored

    def noting(self: Weights, name: str, where: tuple[slice, ...] = ()) -> Any:
        found = own(self, name, where)
        names["whole" if list(found.shape) == self.shape(name) else "part"].append(name)
        return found

    monkeypatch.setattr(Weights, "read_stored", noting)
    return names


@pytest.mark.parametrize("layout", ["hf", "paddle"])
def test_parts_and_nothing_else_are_read(
    paddle: Any, variant: Callable[..., Path], read: dict[str, list[str]], layout: str
) -> None:
    folder = variant("llama-untied")
    tensors = tensors_of(folder)
    first, gate, down, elsewhere = "model", *(f".layers.{name}.weight" for name in (GATE, DOWN, ELSEWHERE))
    if layout == "paddle":
        first = "llama"
        flip = {name: t.T.copy() if "_proj" in name or "lm_head" in name else t for name, t in tensors.items()}
        save_file({name.replace("model.", "llama."): t for name, t in flip.items()}, folder / "model.safetensors")
    model, strategy = load(paddle, folder)
    np.testing.assert_array_equal(strategy.linear(model, GATE).weight.numpy(), tensors[f"model{gate}"].T[:, 24:])
    np.testing.assert_array_equal(strategy.linear(model, DOWN).weight.numpy(), tensors[f"model{down}"].T[24:])
    assert not strategy.linear(model, ELSEWHERE).weight._is_initialized()
    assert sorted(read["part"]) == [first + down, first + gate]
    names = {name.replace("model.", f"{first}.") for name in tensors}
    assert set(read["whole"]) == names - {first + gate, first + down, first + elsewhere}


@pytest.mark.parametrize("name", [GATE, ELSEWHERE], ids=["part", "elsewhere"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks tensors {};"),
        (lambda tensors, name: tensors.update({f"{name}s": tensors[name]}), "holds unknown tensors {}s;"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].copy()}), "tensor {} has shape"),
        (lambda tensors, name: tensors.update({name: tensors[name][24:].copy()}), "tensor {} has shape"),
    ],
    ids=["missing", "unknown", "short", "a part"],
)
def test_all_tensors_must_be_there_and_whole(
    paddle: Any, variant: Callable[..., Path], name: str, change: Callable[..., Any], message: str
) -> None:
    folder = variant("llama-untied")
    tensors, changed = tensors_of(folder), f"model.layers.{name}.weight"
    change(tensors, changed)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(sft.UsageError, match=message.format(changed)):
        load(paddle, folder)


# --- with a quantizer ---------------------------------------------------------------------------------------


class Doubling:
    """A toy quantizer, whose layers hold the weight twice over; ``divides``: whether parts can be taken of them."""

    def __init__(self, divides: bool) -> None:
        self.divides = divides
        self.names: list[str] = []

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any:
        import paddle

        class Doubled(paddle.nn.Layer):
            def __init__(self, held: np.ndarray) -> None:
                super().__init__()
                self.held = held
                self.in_features, self.out_features = held.shape

            def dequantize(self) -> Any:
                return paddle.to_tensor(self.held / 2)

        if self.divides:

            def part(self: Any, axis: int, index: int, count: int) -> Any:
                return Doubled(np.split(self.held, count, axis)[index])

            Doubled.part = part  # type: ignore[attr-defined]
        self.names.append(name)
        return Doubled(np.array(weight) * 2)


def test_a_quantized_layer_is_divided_after_it_was_quantized(
    paddle: Any, models: Path, read: dict[str, list[str]]
) -> None:
    """What a strategy has written on the Linear stands on the layer that replaces it."""
    quantizer = Doubling(divides=True)
    model, strategy = load(paddle, models / "llama-untied", quantizer)
    stored = tensors_of(models / "llama-untied")
    for name, axis, place in ((GATE, 1, np.s_[:, 24:]), (DOWN, 0, np.s_[24:])):
        layer, weight = strategy.linear(model, name), stored[f"model.layers.{name}.weight"].T
        np.testing.assert_array_equal(layer.dequantize().numpy(), weight[place])
        assert (part_of(layer), stage_of(layer)) == (Part(weight.shape, axis, 1, 2), 1)
    assert f"model.layers.{ELSEWHERE}" not in quantizer.names
    assert f"model.layers.{ELSEWHERE}.weight" not in read["whole"] + read["part"]
    assert len(quantizer.names) == 13
    described = {target.name: (target.in_features, target.out_features) for target in sft.target_layers(model)}
    assert described[f"model.layers.{GATE}"] == (32, 48)
    assert described[f"model.layers.{DOWN}"] == (48, 32)


def test_a_quantized_layer_that_cannot_be_divided_is_refused_by_name(paddle: Any, models: Path) -> None:
    message = rf"Doubled, which stands for model\.layers\.{GATE}, cannot be divided among processes; leave the"
    with pytest.raises(sft.UsageError, match=message):
        load(paddle, models / "llama-untied", Doubling(divides=False))
