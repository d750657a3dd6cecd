"""Sizes on paper against models that are built, PaddleNLP's own splitting, and paddle's own segmenting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
import sft.assembly
import sft.settings
from sft.models.loading import load_model, open_model
from sft.testing import make_model
from sft.training.optimizer import Optimizer, default_groups
from sft.training.strategy import batch_loss
from sft_parallel_4d.model_size import ROW, Precision, cut, stages, total

CASES = (
    *("gemma-tied", "llama-headdim", "llama-tied-gqa", "llama-untied", "llama3-scaled", "mistral-gqa"),
    *("qwen2-tied-sharded", "qwen2-untied"),
)
READABLE = [case for case in CASES if case != "llama-headdim"]  # that one is refused: PaddleNLP ignores its head_dim
WHOLE = Precision()


def paper(folder: Path, **settings: Any) -> sft.Outline:
    return sft.outline({"model_name_or_path": str(folder), **settings}).outline


@pytest.mark.parametrize("case", READABLE)
def test_every_parameter_has_its_shape(paddle: Any, models: Path, case: str) -> None:
    built = load_model(open_model(models / case))
    expected = sorted(tuple(p.shape) for p in built.parameters())
    assert sorted(weight.shape for weight in paper(models / case).weights()) == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
def test_what_config_leaves_out_is_what_paddlenlp_takes(paddle: Any, config_of: Any, model_type: str) -> None:
    heads = {"num_attention_heads": 32, "hidden_size": 128}
    folder = config_of(model_type, **heads)
    text = {k: v for k, v in sft_config(folder).items() if k not in ("num_key_value_heads", "head_dim")}
    text.pop("tie_word_embeddings")
    write_config(folder, text)
    _, model_class = open_model(folder).family.classes()
    built = model_class(open_model(folder).config)
    assert sorted(w.shape for w in paper(folder).weights()) == sorted(tuple(p.shape) for p in built.parameters())


def sft_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_bytes_are_those_of_its_state(paddle: Any, models: Path, case: str, dtype: str) -> None:
    model = load_model(open_model(models / case), dtype=dtype)
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(default_groups(parameters, 0.0), sft.settings.TrainingArguments())
    for parameter in parameters.values():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step(1e-3)
    gradients = sum(p.grad.size * p.grad.element_size() for p in parameters.values() if p.grad is not None)
    (stage,) = stages(paper(models / case), 1, 1, Precision(32 if dtype == "float32" else 16))
    assert stage.size.optimizer == sum(array.nbytes for array in optimizer.state().values())
    assert stage.size.weights == sum(p.size * p.element_size() for p in parameters.values())
    assert stage.size.trained == sum(p.size for p in parameters.values())
    assert gradients in (0, stage.size.weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"plugin": ["lora"], "lora_rank": 3},
        {"plugin": ["lora"], "lora_target_modules": ["q_proj", ".*[.]1[.].*down_proj"]},
        {"plugin": ["lora", "pissa", "rslora", "lora-plus"], "lora_rank": 2},
        {"plugin": ["vera"], "vera_rank": 5},
        {"plugin": ["lora", "neftune"]},
    ],
    ids=lambda settings: "-".join([*settings["plugin"], *list(settings)[1:]]),
)
def test_adapters(adapt: Callable[..., sft.Run], base_model: Path, settings: dict[str, Any]) -> None:
    run = adapt(**settings)
    weights = list(paper(base_model, **settings).weights())
    parameters = list(run.model.parameters())
    trained = sorted(tuple(p.shape) for p in parameters if not p.stop_gradient)
    assert sorted(weight.shape for weight in weights if weight.trains) == trained
    # What is no parameter: PiSSA's subtracted pairs, VeRA's shared one and its slices.
    layers = [layer for layer in run.model.sublayers() if hasattr(layer, "_frozen") and layer._frozen is not None]
    frozen = [tensor for layer in layers for tensor in layer._frozen]
    pairs = {id(t): t for layer in run.model.sublayers() for t in getattr(layer, "_pair", ())}
    held = sum(int(p.size) for p in [*parameters, *frozen, *pairs.values()])
    widest = max((t.shape[0] for t in pairs.values()), default=0) * 5 + max(
        (t.shape[1] for t in pairs.values()), default=0
    ) * 5  # fmt: skip
    assert sum(weight.size for weight in weights) == held + widest


def held_in_codes(layer: Any) -> int:
    """Bytes that a quantized layer holds."""
    tensors = [layer.codes, *(getattr(layer, name, None) for name in ("absmax", "scales", "bias"))]
    if isinstance(layer.double, tuple):
        tensors += layer.double[:2]  # the third is a table that all share
    return sum(int(t.size) * t.element_size() for t in tensors if t is not None)


QUANTIZED = pytest.mark.parametrize(
    "settings",
    [
        {"plugin": ["lora", "nf4"], "qlora_weight_blocksize": 64},
        {"plugin": ["lora", "fp4"], "qlora_weight_double_quant": True, "qlora_weight_blocksize": 48},
        {"plugin": ["lora", "int8"]},
        {"plugin": ["lora", "int4"], "weight_only_group_size": 16},
    ],
    ids=lambda settings: settings["plugin"][1],
)


@QUANTIZED
def test_quantized_bases(adapt: Callable[..., sft.Run], models: Path, settings: dict[str, Any]) -> None:
    folder = str(models / "qwen2-untied")
    run = adapt(**settings, model_name_or_path=folder)
    held = sum(int(p.size) * 4 for p in run.model.parameters())
    held += sum(held_in_codes(layer) for layer in run.model.sublayers() if hasattr(layer, "dequantize"))
    outline = paper(Path(folder), **settings)
    (stage,) = stages(outline, 1, 1, WHOLE)
    assert stage.size.weights == held
    assert outline.count() == tuple(reversed(run.sizes))


@QUANTIZED
def test_parts_of_quantized_layers(adapt: Callable[..., sft.Run], tmp_path: Path, settings: dict[str, Any]) -> None:
    """Byte for byte, of a model whose halves are whole blocks and groups."""
    folder = make_model(tmp_path / "wide", hidden_size=384, intermediate_size=768, num_hidden_layers=1)
    layers = {
        target.name: target.layer
        for target in sft.target_layers(adapt(**settings, model_name_or_path=str(folder)).model)
    }
    (block,) = paper(folder, **settings).blocks
    for linear in block:
        part = layers[f"{linear.name}.base"].part(0 if linear.name.endswith(ROW) else 1, 0, 2)
        coded = [(weight, linear.name) for weight in linear.weights if "all" in weight.sides]
        assert total(coded, 2, WHOLE).weights == held_in_codes(part), linear.name


@pytest.mark.parametrize("case", READABLE)
def test_tensor_parallel_sizes_are_those_of_paddlenlps_splitting(paddle: Any, models: Path, case: str) -> None:
    found = paper(models / case)
    degree = 1 if found.kv_heads == 1 else 2
    source = open_model(models / case)
    source.config.tensor_parallel_degree, source.config.tensor_parallel_rank = degree, 0
    _, model_class = source.family.classes()
    actions = model_class._get_tensor_parallel_mappings(source.config, is_split=True)
    built, values = load_model(open_model(models / case)), 0
    for name, parameter in built.named_parameters():
        array = np.zeros(parameter.shape, np.float32)
        action = actions.get(name.removeprefix(source.family.prefix + "."), actions.get(name))
        values += int((action(array) if action is not None else array).size)
    (stage,) = stages(found, degree, 1, WHOLE)
    assert stage.size.values == values


@pytest.mark.parametrize("blocks", [1, 2, 5, 6, 7, 30])
def test_stages_are_cut_as_paddle_cuts_them(paddle: Any, blocks: int) -> None:
    from paddle.distributed.fleet.meta_parallel.parallel_layers.pp_layers import SegmentLayers

    class Block(paddle.nn.Layer):
        pass

    other = paddle.nn.Identity()
    pieces = [other, *(Block() for _ in range(blocks)), other, other]
    for pipeline in range(1, blocks + 1):
        method = "uniform" if blocks % pipeline else "layer:Block"
        assert cut(blocks, pipeline) == SegmentLayers(pieces, pipeline, method).do_segment()


def test_stages_hold_the_model_once_and_a_tied_matrix_twice(outline_of: Callable[..., sft.Outline]) -> None:
    for tied in (False, True):
        outline = outline_of(tie_word_embeddings=tied)
        whole = sum(weight.size for weight in outline.weights())
        twice = outline.embedding.size if tied else 0
        for pipeline in (2, 3, 4):
            assert sum(s.size.values for s in stages(outline, 1, pipeline, WHOLE)) == whole + twice


def test_a_gradient_reaches_all_that_is_said_to_train(paddle: Any, models: Path) -> None:
    model = load_model(open_model(models / "gemma-tied"))
    from sft.models import attention

    attention.install(model, attention.DefaultAttention())
    ids = np.arange(8, dtype=np.int64)[None]
    row = np.full((1, 1, 8, 1), 8, np.int32)
    batch_loss(model, sft.Batch(ids, ids, ids, row, ((8,),))).backward()
    got = sum(int(p.size) for p in model.parameters() if p.grad is not None)
    (stage,) = stages(paper(models / "gemma-tied"), 1, 1, WHOLE)
    assert got * 4 == stage.size.gradients
