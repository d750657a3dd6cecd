"""In which precision a run computes, and the loss scale of float16."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.precision import Precision
from sft.settings.arguments import TrainingArguments
from sft.training import precision
from sft.training.precision import LossScale

FLOAT16 = Precision("float16", "float32")


def chosen(paddle: Any, frozen: bool = True, **training: Any) -> tuple[Precision, list[str]]:
    said: list[str] = []
    return precision.choose_precision(TrainingArguments(**training), training, frozen, said.append), said


def test_float32_without_a_word(paddle: Any) -> None:
    assert chosen(paddle) == (Precision("float32", "float32", "float32"), [])


def test_the_device_is_asked_by_trying(paddle: Any) -> None:
    assert precision.has_matmul("float32")
    assert not precision.has_matmul("int8")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bf16", "this processor has neither avx512_bf16 nor amx_bf16"),
        ("fp16", "paddle has no float16 matrix product on cpu"),
    ],
)
def test_what_the_device_cannot_do_is_said_and_computed_in_float32(
    paddle: Any, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.runtime.cpu_flags", lambda: {"avx2", "avx512f"})
    found, said = chosen(paddle, **{name: True})
    assert found == Precision()
    how = "computing in float32 (require_precision makes this an error)"
    assert said == [f"precision: {name} is asked for, and {reason}: {how}"]
    with pytest.raises(sft.UsageError, match=f"^{name} is asked for, and {reason}; leave {name} out, or leave require"):
        chosen(paddle, **{name: True}, require_precision=True)


HELD = {
    "narrow": "frozen matrices are held in {}, other weights in float32",
    "wide": "weights are held in float32",
    "masters": "weights are held in {}, what trains has float32 masters",
}


@pytest.mark.parametrize(
    ("settings", "frozen", "expected", "held"),
    [
        ({"bf16": True}, True, ("bfloat16", "float32", "bfloat16"), "narrow"),
        ({"bf16": True}, False, ("bfloat16", "float32", "float32"), "wide"),
        ({"bf16": True, "fp16_opt_level": "O1"}, True, ("bfloat16", "float32", "float32"), "wide"),
        ({"bf16": True, "fp16_opt_level": "O2"}, True, ("bfloat16", "bfloat16", "bfloat16"), "masters"),
        ({"fp16": True}, True, ("float16", "float32", "float16"), "narrow"),
        ({"fp16": True, "fp16_opt_level": "O1"}, True, ("float16", "float32", "float32"), "wide"),
        ({"fp16": True, "fp16_opt_level": "O2"}, False, ("float16", "float16", "float16"), "masters"),
    ],
)
def test_levels_on_a_gpu(
    paddle: Any,
    settings: dict[str, Any],
    frozen: bool,
    expected: tuple[str, str, str],
    held: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_matmul", lambda dtype: True)
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    line = f"precision: {expected[0]} products; {HELD[held].format(expected[0])}"
    assert chosen(paddle, frozen, **settings) == (Precision(*expected), [line])


@pytest.mark.parametrize(
    ("settings", "frozen", "held", "more"),
    [
        ({}, True, "narrow", ""),
        ({}, False, "wide", ""),
        ({"fp16_opt_level": "O1"}, True, "wide", ""),
        ({"fp16_opt_level": "O2"}, True, "narrow", "; fp16_opt_level O2 is more than a CPU can do"),
        ({"fp16_opt_level": "O2"}, False, "wide", "; fp16_opt_level O2 is more than a CPU can do"),
    ],
)
def test_levels_on_a_cpu(
    paddle: Any, settings: dict[str, Any], frozen: bool, held: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.models.onednn.why_not", lambda: None)
    found, said = chosen(paddle, frozen, bf16=True, **settings)
    assert found == Precision("bfloat16", "float32", "bfloat16" if held == "narrow" else "float32")
    how = "bfloat16 products with float32 sums, by paddle's oneDNN"
    assert said == [f"precision: {how}; {HELD[held].format('bfloat16')}{more}"]


def test_weights_of_16_bits_are_those_of_the_file_rounded(paddle: Any, models: Path) -> None:
    from sft.models.loading import load_model, open_model

    source = open_model(models / "llama-tied-gqa")
    wide, narrow = load_model(source), load_model(source, precision=Precision("bfloat16", "bfloat16", "bfloat16"))
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
    """At a scale of 2^132 (more than ``scale_loss`` takes) the gradients overflow float32; each skipped step halves
    it."""
    from sft.training import loop

    said: list[str] = []
    monkeypatch.setattr(loop, "LossScale", lambda precision, initial: LossScale(FLOAT16, 2.0**132))
    saving = {"save_strategy": "steps", "save_steps": 1}
    summary = train("scaled", max_steps=12, say=said.append, **saving)
    assert (tmp_path / "scaled" / "checkpoint-1").is_dir()  # what is due at a skipped step is done
    skipped = [line for line in said if "float16 overflow, skipped" in line]
    lines = [line for line in metrics(tmp_path / "scaled") if "loss" in line]
    assert 0 < len(skipped) < 12
    assert summary.skipped_steps == len(skipped)
    assert set(skipped) <= set(sft.read_run(tmp_path / "scaled").notes)
    assert len(lines) == 12 - len(skipped)
    assert lines[0]["step"] == len(skipped) + 1
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)


def with_overflows(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let runs be scaled as in float16, and overflow at these steps."""
    from sft.training import loop
    from sft.training.strategy import SingleProcess

    at: list[int] = [0]
    own = SingleProcess.outcome

    def seed_step(seed: int, step: int, rank: int) -> None:
        at[0] = step

    def outcome(self: SingleProcess, loss: Any, values: Sequence[float], stepped: Any) -> list[float]:
        *sums, norm = own(self, loss, values, stepped)
        return [*sums, float("inf") if at[0] in steps else norm]

    monkeypatch.setattr(loop, "LossScale", lambda precision, initial: LossScale(FLOAT16, initial))
    monkeypatch.setattr(loop, "seed_step", seed_step)
    monkeypatch.setattr(SingleProcess, "outcome", outcome)


def test_a_line_whose_step_overflows_comes_with_the_next_step(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged every 3 steps; 1, 6 and the last one, 11, overflow. No token that was trained is missing in the lines, and
    a run that is resumed in between writes the same ones."""
    with_overflows(monkeypatch, 1, 6, 11)
    settings = {"logging_steps": 3, "max_steps": 11, "save_strategy": "steps", "save_steps": 6, "do_eval": False}
    summary = train("whole", **settings)
    lines = metrics(tmp_path / "whole", same=True)
    assert [line["step"] for line in lines] == [2, 3, 7, 9, 11]
    assert sum(line["target_tokens"] for line in lines) == summary.target_tokens
    assert sum(line["tokens"] for line in lines) == summary.tokens
    assert summary.skipped_steps == 3
    assert all(line["grad_norm"] > 0 for line in lines)
    train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"), **settings)
    assert metrics(tmp_path / "resumed", same=True) == lines


def test_a_checkpoint_of_another_precision_goes_on_in_float16_with_a_scale_of_its_own(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun at 1, the first overflow would end the run. A float16 checkpoint keeps its scale."""
    settings = {"save_strategy": "steps", "save_steps": 2, "do_eval": False}
    train("plain", max_steps=2, **settings)
    with_overflows(monkeypatch, 3)
    said: list[str] = []
    resumed = {"resume_from_checkpoint": str(tmp_path / "plain" / "checkpoint-2"), "scale_loss": 1024.0}
    summary = train("scaled", max_steps=4, say=said.append, **resumed, **settings)
    assert summary.skipped_steps == 1
    assert [line for line in said if "float16" in line] == [
        "step 3: float16 overflow, skipped; the loss scale is now 512"
    ]
    again = {"resume_from_checkpoint": str(tmp_path / "scaled" / "checkpoint-4"), "scale_loss": 1024.0}
    train("again", max_steps=6, **again, **settings)
    state = json.loads((tmp_path / "again" / "checkpoint-6" / "trainer" / "state.json").read_text())
    assert state["loss_scale"] == {"dynamic": True, "value": 512.0, "good_steps": 3}


def test_a_scale_is_loaded_where_it_means_something() -> None:
    float16, float32 = {"value": 256.0, "good_steps": 5}, {"value": 1.0, "good_steps": 0}  # as older ones say it
    for state, expected in ((float16, (256.0, 5)), (float32, (1024.0, 0))):
        scale = LossScale(FLOAT16, 1024.0)
        scale.load(state)
        assert (scale.value, scale.good_steps) == expected
    scale = LossScale(Precision(), 1024.0)
    scale.load(float16)
    assert scale.value == 1.0
