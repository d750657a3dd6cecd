"""DoRA: its layer against the equation in float64, PEFT's adapters, and what is left of it after saving, loading,
merging and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.inference.merge import merge
from sft.inference.open import settings_for
from sft.testing import load, needs

PLUGINS = ["lora", "dora"]
CASES = {"llama-dora-all-linear": "llama-tied-gqa", "qwen2-dora-qv-rs": "qwen2-untied"}
IN, OUT, RANK = 12, 10, 3
TOLERANCE = 1e-4  # as of LoRA: float32 noise of 1e-5 at logits of up to 7
MAGNITUDE = "lora_magnitude_vector"


def quiet(text: str) -> None:
    pass


def layers_of(model: Any) -> dict[str, Any]:
    """Adapted layers by their target's name."""
    return {path: layer for path, layer in model.named_sublayers() if hasattr(layer, "magnitude")}


# --- the layer ----------------------------------------------------------------------------------------------


def layer_of(
    paddle: Any, bias: bool = True, dropout: float = 0.0, subtracted: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A layer with all parts random, and its parts in float64."""
    from sft_peft_lora.dora import Dora
    from sft_peft_lora.layer import layer_class

    generator = np.random.default_rng(1)
    base = paddle.nn.Linear(IN, OUT, bias_attr=None if bias else False)
    shapes = {
        "W": (IN, OUT),
        "b": (OUT,),
        "A": (IN, RANK),
        "B": (RANK, OUT),
        "m": (OUT,),
        "A0": (IN, 2),
        "B0": (2, OUT),
    }
    parts = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for parameter in base.parameters():
        parameter.stop_gradient = True
    base.weight.set_value(parts["W"])
    if bias:
        base.bias.set_value(parts["b"])
    layer = layer_class(Dora(None))(base, IN, OUT, RANK, 0.7, dropout)
    for tensor, name in ((layer.lora_A, "A"), (layer.lora_B, "B"), (layer.magnitude, "m")):
        tensor.set_value(parts[name])
    if subtracted:
        layer.subtract(parts["A0"], parts["B0"])
    exact = {name: part.astype(np.float64) for name, part in parts.items()}
    exact["b"] *= bias
    exact["R"] = exact["W"] - 0.7 * exact["A0"] @ exact["B0"] * subtracted
    exact["V"] = exact["R"] + 0.7 * exact["A"] @ exact["B"]
    exact["gain"] = exact["m"] / np.linalg.norm(exact["V"], axis=0)
    return layer, exact


@pytest.mark.parametrize("subtracted", [False, True], ids=["over W", "over W - s A0 B0"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_output_and_gradients_are_those_of_the_equation(paddle: Any, bias: bool, subtracted: bool) -> None:
    """y = xV ⊙ m/‖V‖ + b with the norm as a constant (arXiv 2402.09353, equations 5 and 11)."""
    layer, p = layer_of(paddle, bias, subtracted=subtracted)
    generator = np.random.default_rng(2)
    x, g = (generator.standard_normal((2, 5, size)).astype(np.float32) for size in (IN, OUT))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    y = layer(tensor)
    (y * paddle.to_tensor(g)).sum().backward()

    flat, upstream = x.reshape(-1, IN).astype(np.float64), g.reshape(-1, OUT).astype(np.float64)
    scaled = upstream * p["gain"]
    expected = {
        "y": flat @ p["V"] * p["gain"] + p["b"],
        "x": scaled @ p["V"].T,
        "A": 0.7 * flat.T @ (scaled @ p["B"].T),
        "B": 0.7 * (flat @ p["A"]).T @ scaled,
        "m": (upstream * (flat @ p["V"])).sum(axis=0) / np.linalg.norm(p["V"], axis=0),
    }
    grads = {"A": layer.lora_A.grad, "B": layer.lora_B.grad, "m": layer.magnitude.grad}
    for name, found in {"y": y, "x": tensor.grad, **grads}.items():
        value = expected[name]
        np.testing.assert_allclose(found.numpy().reshape(value.shape), value, atol=2e-5, rtol=1e-5, err_msg=name)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("subtracted", [False, True])
def test_dropout_is_where_peft_has_it(paddle: Any, subtracted: bool) -> None:
    """x·R + b + (m/‖V‖ − 1)·d·R + m/‖V‖·s·d·A·B: what the magnitude changes of the base is dropped too (d)."""
    layer, p = layer_of(paddle, dropout=0.5, subtracted=subtracted)
    x = np.random.default_rng(2).standard_normal((4, IN)).astype(np.float32)
    paddle.seed(3)
    dropped = layer.dropout(paddle.to_tensor(x)).numpy().astype(np.float64)
    paddle.seed(3)
    found = layer(paddle.to_tensor(x)).numpy()
    residual, low = dropped @ p["R"], 0.7 * dropped @ p["A"] @ p["B"]
    np.testing.assert_allclose(found, x @ p["R"] + p["b"] + (p["gain"] - 1) * residual + p["gain"] * low, atol=2e-5)
    layer.eval()
    for context in (paddle.no_grad(), paddle.enable_grad()):
        with context:
            found = layer(paddle.to_tensor(x)).numpy()
        np.testing.assert_allclose(found, x @ p["V"] * p["gain"] + p["b"], atol=2e-5)


def test_an_output_of_zero_weights_stays_zero(paddle: Any) -> None:
    """And is no number divided by nothing; in the layer, in its gradients and merged."""
    from sft_peft_lora.dora import Dora

    layer, _ = layer_of(paddle, bias=False)
    weight = layer.base.weight.numpy()
    weight[:, 4] = 0
    layer.base.weight.set_value(weight)
    layer.lora_B.set_value(np.zeros((RANK, OUT), np.float32))
    layer.begin(layer.base.weight)
    x = np.ones((1, IN), np.float32)
    y = layer(paddle.to_tensor(x))
    y.sum().backward()
    np.testing.assert_allclose(y.numpy(), x @ weight, atol=1e-5)
    assert all(np.isfinite(p.grad.numpy()).all() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    tensors = {"magnitude": layer.magnitude}
    merged = Dora(None).merged(paddle.to_tensor(weight.T), paddle.zeros([OUT, IN]), tensors)
    np.testing.assert_allclose(merged.numpy(), weight.T, atol=1e-6)


# --- where it begins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["pissa"], ["rslora"]], ids=str)
def test_a_new_adapter_begins_as_its_base(
    adapt: Any, base_model: Path, logits_of: Any, input_ids: Any, more: list[str]
) -> None:
    model = adapt(plugin=[*PLUGINS, *more], lora_rank=4).model
    np.testing.assert_allclose(logits_of(model, input_ids), logits_of(load(base_model), input_ids), atol=TOLERANCE)
    layers = layers_of(model)
    assert len(layers) == 14
    for layer in layers.values():
        norm = np.linalg.norm(layer.base.weight.numpy().astype(np.float64), axis=0)
        np.testing.assert_allclose(layer.magnitude.numpy(), norm, rtol=1e-6)


def test_on_paper_it_is_as_it_is(adapt: Any, base_model: Path, peft: Path) -> None:
    paper = pytest.importorskip("sft_parallel_4d.paper")
    for settings in (
        {"lora_rank": 3, "lora_target_modules": ["q_proj", "down_proj"]},
        {"lora_path": str(peft / "llama-dora-all-linear")},
    ):
        settings = {"plugin": PLUGINS, **settings}
        trained = sum(int(p.size) for p in adapt(**settings).model.parameters() if not p.stop_gradient)
        assert paper.outline({"model_name_or_path": str(base_model), **settings}).outline.count()[1] == trained


# --- what PEFT wrote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts_also_merged(
    models: Path, peft: Path, logits_of: Any, assert_logits_are_pefts: Any, case: str
) -> None:
    assert settings_for(peft / case)[1].readers == PLUGINS
    reference = load_file(peft / case / "reference.safetensors")
    unadapted = logits_of(load(models / CASES[case]), reference["input_ids"])
    assert np.abs(unadapted - reference["logits"]).max() > 3
    assert_logits_are_pefts(case, CASES[case])


def test_loss_and_gradients_are_pefts(adapt: Any, models: Path, peft: Path) -> None:
    """Of A and B, for which the norm is a constant, and of the magnitudes."""
    from sft.training.loss import batch_loss

    case = "llama-dora-all-linear"
    run = adapt(plugin=PLUGINS, model_name_or_path=str(models / CASES[case]), lora_path=str(peft / case))
    expected = load_file(peft / case / "gradients.safetensors")
    ids, labels = expected.pop("input_ids"), expected.pop("labels")
    rows = [[sft.Example(*pair)] for pair in zip(ids, labels, strict=True)]
    loss = batch_loss(run.model, sft.assemble(rows, 0)) / 15
    loss.backward()
    assert float(loss) == pytest.approx(float(expected.pop("loss")[0]), rel=1e-5)
    found = {}
    for name, layer in layers_of(run.model).items():
        found[f"base_model.model.{name}.{MAGNITUDE}"] = layer.magnitude.grad.numpy()
        for half in ("lora_A", "lora_B"):
            found[f"base_model.model.{name}.{half}.weight"] = getattr(layer, half).grad.numpy().T
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-6, rtol=1e-4, err_msg=name)


# --- what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["rslora", "lora-plus"], marks=pytest.mark.slow),
        pytest.param(["pissa"], marks=pytest.mark.slow),
        pytest.param(["nf4"], marks=[needs("nf4"), pytest.mark.slow]),
        pytest.param(["pissa", "rslora", "nf4"], marks=[needs("nf4"), pytest.mark.slow]),
    ],
    ids=lambda more: "-".join(more) or "dora",
)
def test_what_is_written_is_pefts_and_the_trained_model(
    train: Any, models: Path, peft: Path, tmp_path: Path, looking: Any, input_ids: Any, logits_of: Any, more: list[str]
) -> None:
    """In PEFT's names, shapes and config; read again the same (to the bit where the pair is written as it is), and
    merged the same but for float32 noise."""
    look, trained = looking
    base = models / "llama-tied-gqa"
    train("out", (look,), plugin=[*PLUGINS, *more], lora_rank=4, lora_alpha=8)
    rank = 8 if "pissa" in more else 4
    folders = tmp_path / "out", peft / "llama-dora-all-linear"
    written, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    shapes = {n: tuple(rank if k == 4 else k for k in t.shape) for n, t in theirs.items()}
    assert {n: t.shape for n, t in written.items()} == shapes
    config, of_peft = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert config["use_dora"] is True
    assert {*config} <= {*of_peft}
    found = logits_of(load(base, tmp_path / "out"), input_ids)
    np.testing.assert_allclose(found, trained[0], atol=0 if "pissa" not in more else TOLERANCE, rtol=0)
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged = logits_of(load(tmp_path / "merged"), input_ids)
    np.testing.assert_allclose(merged, trained[0], atol=TOLERANCE, rtol=0)
    quantizer = [name for name in more if name == "nf4"]
    assert np.abs(logits_of(load(base, None, quantizer), input_ids) - trained[0]).max() > 0.05


@pytest.mark.parametrize(
    "more", [["pissa"], pytest.param([], marks=pytest.mark.slow)], ids=lambda more: "-".join(more) or "dora"
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    train: Callable[..., Any], tmp_path: Path, more: list[str]
) -> None:
    settings = {"plugin": [*PLUGINS, *more], "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train("whole", **settings)
    train("stopped", **settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].tobytes() == resumed[name].tobytes() for name in whole)


def test_a_run_goes_on_from_a_dora_adapter(train: Any, peft: Path, tmp_path: Path) -> None:
    """What PEFT wrote is what is written again where nothing was learned."""
    adapter = peft / "llama-dora-all-linear"
    train("out", plugin=PLUGINS, lora_path=str(adapter), learning_rate=0.0)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_adapter_of_the_other_kind_is_refused(train: Any, base_model: Path, peft: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"use_dora = True is more than LoRA, and no active plugin reads it"):
        train(plugin=["lora"], lora_path=str(peft / "llama-dora-all-linear"))
    with pytest.raises(
        sft.UsageError, match=r"has use_dora = False, and an active plugin .* use_dora = True; leave that"
    ):
        train(plugin=PLUGINS, lora_path=str(peft / "llama-lora-all-linear"))
    with pytest.raises(sft.UsageError, match=r"Plugin dora does not read .*, a LORA adapter"):
        load(base_model, peft / "llama-lora-all-linear", ["dora"])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("lora_A.weight", None),
        ("lora_B.weight", None),
        (MAGNITUDE, None),
        (MAGNITUDE, lambda values: values[:-1].copy()),
        (MAGNITUDE, lambda values: values[:, None].copy()),
    ],
    ids=["A", "B", "m", "short m", "m of two dimensions"],
)
def test_a_damaged_folder_is_refused(
    base_model: Path, adapter_variant: Any, key: str, change: Callable[..., Any] | None
) -> None:
    folder = adapter_variant("llama-dora-all-linear")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.mlp.up_proj.{key}"
    values = tensors.pop(name)
    if change is not None:
        tensors[name] = change(values)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(sft.UsageError, match=r"layers\.0\.mlp\.up_proj.* (is not complete|is not there|have 1 there)"):
        load(base_model, folder)
