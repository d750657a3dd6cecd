"""The seams of the model, through toy plugins given to ``sft.run``: its config, quantized layers, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_plugins import providing

import sft

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


def test_the_config_can_be_changed_before_any_layer_exists(train: Train, models: Path, tmp_path: Path) -> None:
    """Against a model directory that says the same."""

    class Epsilon(sft.Plugin):
        name = "epsilon"
        api_version = 1

        @sft.hookimpl
        def sft_model_config(self, run: sft.Run, config: Any) -> None:
            assert not hasattr(run, "model")
            config["rms_norm_eps"] = 0.5

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (models / "llama-tied-gqa").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    found = train("plugin", (Epsilon,), max_steps=1)
    expected = train("directory", max_steps=1, model_name_or_path=str(folder))
    plain = train("plain", max_steps=1)
    assert found.eval_loss_before == expected.eval_loss_before
    assert abs(found.eval_loss_before - plain.eval_loss_before) > 1e-2


class Scaling(sft.Plugin):
    """A toy adapter: y = base(x) ⊙ (1 + v) on every v_proj; only the vectors train, and only they are kept."""

    name = "scaling"
    api_version = 1

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.layers: dict[str, Any] = {}

    @sft.hookimpl
    def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
        assert all(parameter.stop_gradient for parameter in model.parameters())  # the base comes frozen
        for target in sft.target_layers(model, ["v_proj"]):
            self.layers[target.name] = scaled(target.layer, target.out_features)
            target.replace(self.layers[target.name])

    @sft.hookimpl
    def sft_export_adapter(self, run: sft.Run, model: Any) -> sft.AdapterFiles:
        tensors = {f"base_model.model.{name}.v": layer.v.numpy() for name, layer in self.layers.items()}
        return sft.AdapterFiles({"peft_type": "SCALING"}, tensors)


def scaled(base: Any, size: int) -> Any:
    import paddle

    class Scaled(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            self.v = self.create_parameter([size], default_initializer=paddle.nn.initializer.Constant(0.0))

        def forward(self, x: Any) -> Any:
            return self.base(x) * (1 + self.v)

    return Scaled()


def test_an_adapter_trains_and_is_all_that_is_written(train: Train, models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = train("out", (Scaling,), say=said.append, learning_rate=3e-2)
    plain = train("plain", max_steps=1)
    out = tmp_path / "out"
    assert summary.eval_loss_before == plain.eval_loss_before
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05
    assert summary.trainable_parameters == 2 * 16
    assert any(f"{summary.total_parameters:,} parameters, 32 train (0.12 %)" in text for text in said)
    assert summary.total_parameters == plain.total_parameters + 32
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "rows.json",
        "run.json",
        "sft.log",
        "steps.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "adapter_config.json").read_text()) == {"peft_type": "SCALING"}
    written = load_file(out / "adapter_model.safetensors")
    assert list(written) == [f"base_model.model.model.layers.{n}.self_attn.v_proj.v" for n in (0, 1)]
    assert all(tensor.shape == (16,) and tensor.all() for tensor in written.values())


class Halves:
    """A toy quantizer: every Linear of the blocks in float16."""

    def __init__(self, run: sft.Run) -> None:
        assert not hasattr(run, "model")

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any:
        import paddle

        class Half(paddle.nn.Layer):
            def __init__(self) -> None:
                super().__init__()
                self.in_features, self.out_features = weight.shape
                self.register_buffer("codes", paddle.to_tensor(weight.astype(np.float16)))

            def dequantize(self) -> Any:
                return self.codes.astype("float32")

            def forward(self, x: Any) -> Any:
                return paddle.matmul(x, self.dequantize())

        assert bias is None
        return Half()


def test_a_quantizer_and_an_adapter_work_together(train: Train, models: Path, tmp_path: Path) -> None:
    """Against a model whose file holds the rounded weights."""
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (models / "llama-tied-gqa").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor.astype(np.float16).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    settings = {"max_steps": 2, "learning_rate": 3e-2}
    found = train("quantized", (Scaling, providing("sft_quantizer", Halves)), **settings)
    expected = train("rounded", (Scaling,), model_name_or_path=str(folder), **settings)
    assert found.eval_loss_before == pytest.approx(expected.eval_loss_before, rel=1e-6)
    assert found.eval_loss_after == pytest.approx(expected.eval_loss_after, rel=1e-5)
    assert found.total_parameters == expected.total_parameters


def test_a_plugin_may_choose_what_trains(train: Train, models: Path, tmp_path: Path) -> None:
    class Norms(sft.Plugin):
        name = "norms"
        api_version = 1

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
            for name, parameter in model.named_parameters():
                parameter.stop_gradient = "layernorm" not in name

    train("out", (Norms,), max_steps=2)
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if np.any(after[name] != tensor)}
    assert changed == {name for name in before if "layernorm" in name}


def test_a_run_in_which_nothing_trains_is_refused(train: Train, tmp_path: Path) -> None:
    class Frozen(sft.Plugin):
        name = "frozen"
        api_version = 1

        @sft.hookimpl
        def sft_adapt_model(self, run: sft.Run, model: Any) -> None:
            for parameter in model.parameters():
                parameter.stop_gradient = True

    with pytest.raises(sft.UsageError, match="Nothing trains"):
        train("out", (Frozen,))
    assert not (tmp_path / "out").exists()


def test_adapted_layers_are_named_as_peft_reads_them() -> None:
    """A last part means every layer of that kind, so where it would mean too many each is named."""
    everything = [f"model.layers.{n}.self_attn.{kind}" for n in range(2) for kind in ("q_proj", "v_proj")]
    assert sft.module_names(everything, everything) == ["q_proj", "v_proj"]
    assert sft.module_names(everything[1::2], everything) == ["v_proj"]
    assert sft.module_names(everything[2:], everything) == everything[2:]
    assert sft.module_names(everything[:3], everything) == everything[:3]
