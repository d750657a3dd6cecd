"""In which precision a run computes, and the loss scale of float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.settings import TrainingArguments
from sft.training import precision
from sft.training.precision import LossScale, Precision

FLOAT16 = Precision("float16", "float32")


def chosen(paddle: Any, **training: Any) -> tuple[Precision, list[str]]:
    said: list[str] = []
    return precision.choose(TrainingArguments(**training), said.append), said


def test_float32_without_a_word(paddle: Any) -> None:
    assert chosen(paddle) == (Precision("float32", "float32"), [])


def test_the_device_is_asked_by_trying(paddle: Any) -> None:
    assert precision.has_matmul("float32")
    assert not precision.has_matmul("int8")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_what_the_device_cannot_do_is_said_and_computed_in_float32(
    paddle: Any, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_matmul", lambda dtype: False)
    found, said = chosen(paddle, **{name: True})
    assert found == Precision()
    assert len(said) == 1
    assert f"{name} is asked for" in said[0]
    assert "computing in float32" in said[0]
    with pytest.raises(sft.UsageError, match=f"{name} is asked for, and paddle has no {dtype} matrix product"):
        chosen(paddle, **{name: True}, require_precision=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bf16": True}, Precision("bfloat16", "float32")),
        ({"bf16": True, "fp16_opt_level": "O2"}, Precision("bfloat16", "bfloat16")),
        ({"fp16": True, "fp16_opt_level": "O1"}, Precision("float16", "float32")),
        ({"fp16": True, "fp16_opt_level": "O2"}, Precision("float16", "float16")),
        ({"fp16_opt_level": "O2"}, Precision("float32", "float32")),
    ],
)
def test_levels(paddle: Any, settings: dict[str, Any], expected: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_matmul", lambda dtype: True)
    assert chosen(paddle, **settings) == (expected, [])


def test_weights_of_16_bits_are_those_of_the_file_rounded(paddle: Any, models: Path) -> None:
    from sft.models.loading import load_model, open_model

    source = open_model(models / "llama-tied-gqa")
    wide, narrow = load_model(source), load_model(source, dtype="bfloat16")
    for (name, one), (_, other) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert other.dtype == paddle.bfloat16
        expected = one.astype("bfloat16").astype("float32").numpy()
        np.testing.assert_array_equal(other.astype("float32").numpy(), expected, err_msg=name)
    assert paddle.get_default_dtype() == "float32"


# --- the loss scale -----------------------------------------------------------------------------------------


def test_other_precisions_are_not_scaled() -> None:
    scale = LossScale(Precision("bfloat16", "bfloat16"), 1024.0)
    assert (scale.value, scale.accepts(1.0, 1.0), scale.accepts(float("nan"), 1.0), scale.gives_up) == (
        1.0,
        True,
        False,
        True,
    )


def test_an_overflow_halves_and_a_long_time_without_one_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    scale = LossScale(FLOAT16, 1024.0)
    values = []
    for norm in [1.0, float("inf"), 1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]:
        taken = scale.accepts(1.0, norm)
        assert taken == np.isfinite(norm)
        values.append(scale.value)
    assert values == [1024, 512, 512, 512, 256, 256, 256, 512, 512]
    again = LossScale(FLOAT16, 1.0)
    again.load(scale.state())
    assert (again.value, again.good_steps) == (512, 1)


def test_nothing_left_to_halve_ends_the_run() -> None:
    scale = LossScale(FLOAT16, 2.0)
    for _ in range(2):
        assert not scale.accepts(float("inf"), 1.0)
    assert scale.gives_up


def test_a_scaled_run_learns_what_an_unscaled_one_does(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss scale is a power of two, so that float32 runs with and without it are equal to the last bit."""
    from sft.training import loop

    train("plain", max_steps=3)
    monkeypatch.setattr(loop, "LossScale", lambda precision, initial: LossScale(FLOAT16, initial))
    train("scaled", max_steps=3)
    assert metrics(tmp_path / "scaled", same=True) == metrics(tmp_path / "plain", same=True)


def test_a_step_that_overflows_is_skipped(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a scale of 2^66 the squared gradients overflow float32; each skipped step halves it."""
    from sft.training import loop

    said: list[str] = []
    monkeypatch.setattr(loop, "LossScale", lambda precision, initial: LossScale(FLOAT16, initial))
    saving = {"save_strategy": "steps", "save_steps": 1}
    summary = train("scaled", max_steps=12, scale_loss=2.0**66, say=said.append, **saving)
    assert (tmp_path / "scaled" / "checkpoint-1").is_dir()  # what is due at a skipped step is done
    skipped = [line for line in said if "float16 overflow, skipped" in line]
    lines = [line for line in metrics(tmp_path / "scaled") if "loss" in line]
    assert 0 < len(skipped) < 12
    assert summary.skipped_steps == len(skipped)
    assert len(lines) == 12 - len(skipped)
    assert lines[0]["step"] == len(skipped) + 1
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)
