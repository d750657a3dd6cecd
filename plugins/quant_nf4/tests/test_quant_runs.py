"""Runs over a quantized base: what is refused and when, and that stopping and resuming does not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.inference.evaluate import evaluate_finished
from sft.testing import needs, read_metrics


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, paddle: Any) -> None:
    """Whoever loads weights fails."""
    from sft.models import loading

    def load(*arguments: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)


def test_two_quantizers_are_refused(train: Callable[..., Any], no_weights: None, tmp_path: Path) -> None:
    message = r"Plugins nf4 \(.*\) and int8 \(.*\) both provide sft_quantizer, which has one place; leave one out"
    with pytest.raises(sft.UsageError, match=message):
        train(plugin=["nf4", "int8"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "int4"])
def test_training_all_of_a_quantized_base_is_refused(
    train: Callable[..., Any], no_weights: None, tmp_path: Path, name: str
) -> None:
    with pytest.raises(sft.UsageError, match=f"Plugin {name} quantizes the base model, .* add an adapter plugin"):
        train(plugin=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_quantize_algo": "nf5"}, "weight_quantize_algo: expected one of fp4, nf4, .*got 'nf5'"),
        (
            {"plugin": ["nf4"], "weight_quantize_algo": "fp4"},
            r"Plugins fp4 \(.*\) and nf4 \(.*\) both provide sft_quantizer",
        ),
        ({"plugin": ["nf4"], "qlora_weight_blocksize": 63}, "qlora_weight_blocksize must be even"),
        ({"plugin": ["nf4"], "qlora_weight_blocksize": 0}, "qlora_weight_blocksize: expected .* at least 2, got 0"),
        ({"plugin": ["int4"], "weight_only_group_size": 1}, "weight_only_group_size: expected .* at least 2.*, got 1"),
        ({"plugin": ["nf4"], "weight_only_group_size": 8}, "Unknown setting weight_only_group_size"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(
    train: Callable[..., Any], no_weights: None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(sft.UsageError, match=message):
        train(**settings)


@needs("lora")
def test_a_group_that_does_not_divide_a_layer_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match="weight_only_group_size 5 does not divide 32 inputs"):
        train(plugin=["lora", "int4"], weight_only_group_size=5)
    assert not (tmp_path / "out").exists()


@needs("lora")
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_codes_count_as_parameters(
    train: Callable[..., Any], models: Path, dataset: Path, tmp_path: Path, name: str
) -> None:
    """Qwen2's biases too, which a quantized layer keeps beside its codes."""
    settings: dict[str, Any] = {"model_name_or_path": str(models / "qwen2-untied")}
    said: list[str] = []
    plain = train("plain", plugin=["lora"], max_steps=1, **settings)
    quantized = train("codes", plugin=["lora", name], max_steps=1, say=said.append, **settings)
    assert quantized.total_parameters == plain.total_parameters
    assert quantized.trainable_parameters == plain.trainable_parameters
    plan = " ".join(next(line for line in said if line.startswith("plan:")).split())
    assert f" %), 14 Linears held by {name} " in plan  # seven in each of the two blocks
    evaluate_finished({**settings, "dataset_name_or_path": str(dataset)}, tmp_path / "codes", said.append)
    assert (
        f"model: {plain.total_parameters - plain.trainable_parameters:,} parameters, 14 Linears held by {name}" in said
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


@needs("lora")
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_quantize_algo": "nf4", "qlora_weight_double_quant": True},
        {"weight_quantize_algo": "weight_only_int4", "weight_only_group_size": 16},
    ],
    ids=["nf4", "int4"],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    train: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    class StoppedError(sft.SftError):
        pass

    class Stop(sft.Plugin):
        name = "stop"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                raise StoppedError

    settings = {"plugin": ["lora"], "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1, **settings}
    train("whole", **settings)
    with pytest.raises(StoppedError):
        train("out", (Stop,), **settings)
    train("out", resume_from_checkpoint="auto", **settings)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert len({loss for _, loss in losses(tmp_path / "out")}) == 4
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()
