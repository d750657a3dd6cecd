"""The quantizer's seam: what a quantizer is given while weights stream in, and what becomes of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merging import write_merged
from model_folders import TOLERANCE, largest_difference, load, own_logits, reference
from safetensors.numpy import load_file, save_file

import sft

DOWN = "model.layers.0.mlp.down_proj.weight"


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


class Rounding:
    """A toy quantizer: 8 bits a weight with one scale, for every Linear but o_proj. Remembers what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any | None:
        self.given[name] = (weight, bias)
        return None if name.endswith("o_proj") else rounded_linear(weight, bias)

    @staticmethod
    def codes(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
        scale = np.float32(np.abs(weight).max() / 127)
        return np.rint(weight / scale).astype(np.int8), scale


def rounded_linear(weight: np.ndarray, bias: np.ndarray | None) -> Any:
    import paddle

    class RoundedLinear(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = weight.shape
            codes, self.scale = Rounding.codes(weight)
            self.register_buffer("codes", paddle.to_tensor(codes))
            self.register_buffer("offset", None if bias is None else paddle.to_tensor(bias))

        def dequantize(self) -> Any:
            return self.codes.astype("float32") * float(self.scale)

        def forward(self, x: Any) -> Any:
            return paddle.nn.functional.linear(x, self.dequantize(), self.offset)

    return RoundedLinear()


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "qwen2-tied-sharded", "mistral-gqa", "gemma-tied"])
def test_a_quantizer_sees_every_linear_of_the_blocks_in_paddles_layout(paddle: Any, models: Path, case: str) -> None:
    quantizer = Rounding()
    load(models / case, quantizer)
    stored: dict[str, np.ndarray] = {}
    for path in (models / case).glob("model*.safetensors"):
        stored.update(load_file(path))
    linears = {name for name in stored if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    assert len(linears) == 14
    assert set(quantizer.given) == {name[: -len(".weight")] for name in linears}
    for name, (weight, bias) in quantizer.given.items():
        original = name
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, stored[f"{original}.weight"].astype(np.float32).T)
        if f"{original}.bias" in stored:
            assert bias is not None
            assert bias.dtype == np.float32
            np.testing.assert_array_equal(bias, stored[f"{original}.bias"].astype(np.float32))
        else:
            assert bias is None


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
def test_a_quantized_model_computes_with_the_rounded_weights(
    paddle: Any, variant: Callable[..., Path], case: str
) -> None:
    """Against a plain model of the same weights, rounded in its files."""
    folder = variant(case)
    quantizer = Rounding()
    model = load(folder, quantizer)

    def around(tensors: dict[str, np.ndarray]) -> None:
        for name, weight in tensors.items():
            if name.endswith("_proj.weight") and "o_proj" not in name:
                codes, scale = Rounding.codes(weight)
                tensors[name] = codes.astype(np.float32) * scale

    change_tensors(folder, around)
    input_ids, exact = reference(folder)
    found = own_logits(model, input_ids)
    assert largest_difference(found, own_logits(load(folder), input_ids)) < TOLERANCE
    assert largest_difference(found, exact) > 100 * TOLERANCE  # it was really rounded


def test_no_float_parameter_of_a_quantized_layer_remains(paddle: Any, models: Path) -> None:
    quantizer = Rounding()
    model = load(models / "qwen2-untied", quantizer)
    left = dict(model.named_parameters())
    quantized = [name for name in quantizer.given if not name.endswith("o_proj")]
    assert len(quantized) == 12
    assert not [name for name in left if name.rpartition(".")[0] in quantized]
    assert len([name for name in left if name.endswith("o_proj.weight")]) == 2
    assert sum(int(parameter.size) for parameter in left.values()) == sum(
        tensor.size
        for name, tensor in load_file(models / "qwen2-untied" / "model.safetensors").items()
        if not any(f".{kind}_proj." in name for kind in ("q", "k", "v", "gate", "up", "down"))
    )


def test_a_linear_that_was_quantized_is_gone_for_good(paddle: Any, models: Path) -> None:
    """Also where adapters give their places back."""
    model = load(models / "qwen2-untied", Rounding())
    for parameter in model.parameters():
        parameter.stop_gradient = True
    names = [name for name, _ in model.named_parameters()]
    with sft.Reference(model)():
        assert [name for name, _ in model.named_parameters()] == names


def test_a_quantized_layer_is_still_a_target(paddle: Any, models: Path) -> None:
    plain, quantized = load(models / "llama-tied-gqa"), load(models / "llama-tied-gqa", Rounding())
    described = [
        [(target.name, target.in_features, target.out_features) for target in sft.target_layers(model)]
        for model in (plain, quantized)
    ]
    assert len(described[0]) == 14
    assert described[0] == described[1]


def test_a_missing_weight_is_named_with_a_quantizer_too(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(sft.UsageError, match=rf"lacks tensors {DOWN}"):
        load(folder, Rounding())


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "glm4"])
def test_a_merge_quantizes_what_a_run_quantizes(paddle: Any, models: Path, tmp_path: Path, family: str) -> None:
    """Not the router of experts, whose weight is a matrix too."""
    from sft.data.tokenizer import Tokenizer
    from sft.models.loading import open_model

    class Nothing:
        def merge(self, name: str, weight: Any) -> Any:
            return weight

        def unused(self) -> list[str]:
            return []

    folder, in_run, in_merge = models.parent / "families" / family, Rounding(), Rounding()
    model = load(folder, in_run)
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    write_merged(tmp_path / "merged", open_model(folder), Nothing(), tokenizer, in_merge)
    assert in_merge.given.keys() == in_run.given.keys()
    input_ids, _ = reference(folder)
    merged = own_logits(load(tmp_path / "merged"), input_ids)
    assert largest_difference(merged, own_logits(model, input_ids)) < TOLERANCE
