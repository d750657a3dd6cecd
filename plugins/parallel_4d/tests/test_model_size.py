"""Sizes on paper against models that are built, and divided as the engine divides them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sft
import sft.settings.arguments
from sft.distributed.parts import is_elsewhere
from sft.models.decoder import CausalLM
from sft.models.loading import load_model, open_model
from sft.precision import Precision as Weights
from sft.testing import make_model, needs
from sft.training.adamw import AdamW
from sft.training.groups import default_groups
from sft.training.loss import batch_loss
from sft_parallel_4d import experts, tensor
from sft_parallel_4d.experts import ExpertParallel
from sft_parallel_4d.model_size import ROW, Division, Precision, divided_side, stages, total
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import outline as on_paper
from sft_parallel_4d.pipeline import Pipeline
from sft_parallel_4d.tensor import TensorParallel
from sft_parallel_4d.topology import Axis

pytestmark = pytest.mark.sweep  # as far as its tests are slow

MODELS = Path(__file__).parents[3] / "core" / "tests" / "fixtures"
CASES = sorted(str(path.parent.relative_to(MODELS)) for path in MODELS.glob("*/*/config.json"))
WHOLE = Precision()
QUICK = ("gemma2", "olmo2", "phi3", "qwen2-moe")
"""Of the families: caps and windows, norms over all heads, fused matrices, experts with one that all share."""


def paper(folder: Path, **settings: Any) -> Outline:
    return on_paper({"model_name_or_path": str(folder), **settings}).outline


def built(folder: Path) -> Any:
    """The model of a ``config.json``; none of its parameters is allocated."""
    import paddle

    with paddle.LazyGuard():
        return CausalLM(paper(folder).architecture)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_its_shape(paddle: Any, case: str) -> None:
    expected = sorted(tuple(p.shape) for p in built(MODELS / case).parameters())
    assert sorted(weight.shape for weight in paper(MODELS / case).weights()) == expected


def sft_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_bytes_are_those_of_its_state(paddle: Any, models: Path, case: str, dtype: str) -> None:
    model = load_model(open_model(models / case), precision=Weights(dtype, dtype, dtype))
    parameters = dict(model.named_parameters())
    optimizer = AdamW(default_groups(parameters, 0.0), sft.settings.arguments.TrainingArguments())
    for parameter in parameters.values():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step(1e-3)
    gradients = sum(p.grad.size * p.grad.element_size() for p in parameters.values() if p.grad is not None)
    (stage,) = stages(paper(models / case), Division(), 1, Precision(32 if dtype == "float32" else 16))
    assert stage.size.optimizer == sum(array.nbytes for array in optimizer.state().values())
    assert stage.size.weights == sum(p.size * p.element_size() for p in parameters.values())
    assert stage.size.trained == sum(p.size for p in parameters.values())
    assert gradients in (0, stage.size.weights)


@pytest.mark.parametrize("model", ["llama-tied-gqa", "qwen2-untied"])
@pytest.mark.parametrize("optim", ["lion", "adafactor", "adamw_8bit", "muon"])
def test_bytes_of_other_optimizers_are_those_of_their_state(
    adapt: Callable[..., sft.Run], models: Path, model: str, optim: str
) -> None:
    """As each plugin says; a tied matrix, an lm_head of its own, and biases."""
    pytest.importorskip("sft_optimizers")
    from sft.training.groups import make_optimizer

    settings: dict[str, Any] = {"model_name_or_path": str(models / model), "optim": optim}
    settings |= {"adamw_8bit_min_size": 600} if optim == "adamw_8bit" else {}
    optimizer = make_optimizer(adapt(**settings))  # type: ignore[arg-type]
    for parameter in optimizer.parameters.values():
        parameter.grad_ = parameter * 0
    optimizer.step(0.0)
    (stage,) = stages(on_paper(settings).outline, Division(), 1, WHOLE)
    assert stage.size.optimizer == sum(array.nbytes for array in optimizer.state().values())


def marked(settings: dict[str, Any]) -> Any:
    return pytest.param(settings, marks=needs(*settings["plugin"]))


@pytest.mark.parametrize(
    "settings",
    [
        marked({"plugin": ["lora"], "lora_rank": 3}),
        marked({"plugin": ["lora"], "lora_target_modules": ["q_proj", ".*[.]1[.].*down_proj"]}),
        marked({"plugin": ["lora", "pissa", "rslora", "lora-plus"], "lora_rank": 2}),
        marked({"plugin": ["vera"], "vera_rank": 5}),
        marked({"plugin": ["lora", "neftune"]}),
    ],
    ids=lambda settings: "-".join([*settings["plugin"], *list(settings)[1:]]),
)
def test_adapters(adapt: Callable[..., sft.Run], base_model: Path, settings: dict[str, Any]) -> None:
    run = adapt(**settings)
    weights = list(paper(base_model, **settings).weights())
    parameters = list(run.model.parameters())
    trained = sorted(tuple(p.shape) for p in parameters if not p.stop_gradient)
    assert sorted(weight.shape for weight in weights if weight.trains) == trained
    # What is no parameter: PiSSA's subtracted pairs, and VeRA's, of which all layers see one memory.
    frozen: dict[int, int] = {}
    for layer in run.model.sublayers():
        for name in getattr(layer, "sides", ()):
            tensor = getattr(layer, name)
            if tensor is not None and name not in layer._parameters:
                frozen[tensor.data_ptr()] = max(int(tensor.size), frozen.get(tensor.data_ptr(), 0))
    assert sum(weight.size for weight in weights) == sum(int(p.size) for p in parameters) + sum(frozen.values())


def held_in_codes(layer: Any) -> int:
    """Bytes that a quantized layer holds."""
    tensors = [layer.codes, *(getattr(layer, name, None) for name in ("absmax", "scales", "bias"))]
    if isinstance(layer.double, tuple):
        tensors += layer.double[:2]  # the third is a table that all share
    return sum(int(t.size) * t.element_size() for t in tensors if t is not None)


QUANTIZED = pytest.mark.parametrize(
    "settings",
    [
        marked({"plugin": ["lora", "nf4"], "qlora_weight_blocksize": 64}),
        marked({"plugin": ["lora", "fp4"], "qlora_weight_double_quant": True, "qlora_weight_blocksize": 48}),
        marked({"plugin": ["lora", "int8"]}),
        marked({"plugin": ["lora", "int4"], "weight_only_group_size": 16}),
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
    (stage,) = stages(outline, Division(), 1, WHOLE)
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
        coded = [(weight, divided_side(linear.name)) for weight in linear.weights if "all" in weight.sides]
        assert total(tuple(coded), Division(2), WHOLE).weights == held_in_codes(part), linear.name


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if Path(case).name in QUICK else [pytest.mark.slow])
        for case in CASES
        if case.startswith("families")
    ],
)
def test_each_rank_has_the_size_that_the_engine_gives_it(
    paddle: Any, config_of: Any, case: str, tensor: int, pipeline: int
) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 5, "num_key_value_heads": 2}
    values = {**sft_config(MODELS / case), **changes}
    values.update({name: (values[name] * 5)[:5] for name in ("layer_types", "no_rope_layers") if name in values})
    folder = config_of(**values)
    found = paper(folder)
    for number, stage in enumerate(stages(found, Division(tensor), pipeline, WHOLE)):
        for rank in range(tensor):
            model = built(folder)
            if tensor > 1:
                TensorParallel(axis(rank, tensor), False, axis(0, 1)).divide(model)
            if pipeline > 1:
                Pipeline(axis(number, pipeline), 5).divide(model)
            assert stage.size.values == values_here(model)


def axis(rank: int, size: int) -> Axis:
    return Axis(rank, SimpleNamespace(nranks=size))


def values_here(model: Any) -> int:
    return sum({id(p): math.prod(p.shape) for p in model.parameters() if not is_elsewhere(p)}.values())


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of processes of which only this one is there."""
    for module in (tensor, experts):
        monkeypatch.setattr(
            module, "among", lambda world, whole, places, apart=False: axis(places.index(whole.rank), len(places))
        )


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_the_fullest_rank_of_fewer_heads_and_an_odd_vocabulary(
    paddle: Any, grouped: None, config_of: Any, keys: int
) -> None:
    folder = config_of(num_key_value_heads=keys, vocab_size=511, tie_word_embeddings=False)
    found = []
    for rank in range(4):
        model = built(folder)
        TensorParallel(axis(rank, 4), False, axis(0, 1)).divide(model)
        found.append(values_here(model))
    assert max(found) == found[0] + 2 * 64  # 128 tokens of 511, and of embedding and head as many
    (stage,) = stages(paper(folder), Division(4, copies=4 // keys), 1, WHOLE)
    assert stage.size.values == max(found)
    assert stage.size.copied == (0 if keys == 4 else 4 * 2 * 4 * 64 * 8)  # two matrices a block, of one head


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe"])
def test_each_rank_has_its_experts(paddle: Any, grouped: None, case: str) -> None:
    outline = paper(MODELS / "families" / case)
    for degree in (2, 4):
        (stage,) = stages(outline, Division(experts=degree), 1, WHOLE)
        for rank in range(degree):
            model = built(MODELS / "families" / case)
            ExpertParallel(axis(rank, degree), degree, axis(0, 1)).divide(model)
            assert stage.size.values == values_here(model)
        assert stage.experts.values * degree == stages(outline, Division(), 1, WHOLE)[0].experts.values


def test_stages_hold_the_model_once_and_a_tied_matrix_twice(outline_of: Callable[..., Outline]) -> None:
    for tied in (False, True):
        outline = outline_of(tie_word_embeddings=tied)
        whole = sum(weight.size for weight in outline.weights())
        twice = outline.embedding.size if tied else 0
        for pipeline in (2, 3, 4):
            assert sum(s.size.values for s in stages(outline, Division(), pipeline, WHOLE)) == whole + twice


def test_a_gradient_reaches_all_that_is_said_to_train(paddle: Any, models: Path) -> None:
    model = load_model(open_model(models / "gemma-tied"))
    ids = np.arange(8, dtype=np.int64)[None]
    row = np.full((1, 1, 8, 1), 8, np.int32)
    batch_loss(model, sft.Batch(ids, ids, ids, row, ((8,),))).backward()
    got = sum(int(p.size) for p in model.parameters() if p.grad is not None)
    (stage,) = stages(paper(models / "gemma-tied"), Division(), 1, WHOLE)
    assert got * 4 == stage.size.gradients


@pytest.mark.parametrize(
    ("settings", "bits", "built_as"),
    [
        ({}, (32, 32, None), ("float32", "float32", "float32")),
        ({"bf16": True}, (32, 16, 16), ("bfloat16", "float32", "bfloat16")),
        ({"fp16": True, "fp16_opt_level": "O1"}, (32, 16, 32), ("float16", "float32", "float32")),
        ({"fp16": True, "fp16_opt_level": "O2"}, (16, 16, 16), ("float16", "float16", "float16")),
    ],
    ids=["float32", "bf16", "O1", "O2"],
)
def test_a_frozen_base_has_the_bits_that_a_run_gives_it(
    paddle: Any, models: Path, settings: dict[str, Any], bits: tuple[int, ...], built_as: tuple[str, ...]
) -> None:
    from sft.models.loading import build_model
    from sft.precision import Precision as CorePrecision
    from sft_parallel_4d.reckoning import precision_of

    folder = models / "qwen2-untied"
    run = on_paper({"model_name_or_path": str(folder), **settings}).run
    assert precision_of(run.settings) == Precision(*bits)
    outline = paper(folder)
    outline.freeze()
    (stage,) = stages(outline, Division(), 1, Precision(*bits))
    model = build_model(open_model(folder), CorePrecision(*built_as))
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    held = sum(math.prod(p.shape) * sizes[str(p.dtype).rpartition(".")[2]] for p in model.parameters())
    assert stage.size.weights == held
