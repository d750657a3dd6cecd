"""Early stopping: after the evaluation after which transformers stops, also in a run that was stopped in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sft
from sft.settings.arguments import DataArguments, GenerationArguments, ModelArguments, Settings, TrainingArguments
from sft.testing import read_metrics
from sft_early_stopping.early_stopping import EarlyStopping, EarlyStoppingOptions

Train = Callable[..., sft.Summary]
CASES = json.loads((Path(__file__).parent / "fixtures" / "transformers.json").read_text(encoding="utf-8"))


def plugin_of(case: dict[str, Any]) -> EarlyStopping:
    options = EarlyStoppingOptions(case["patience"], case["threshold"], "score", case["greater"])
    return EarlyStopping(options)


def a_run(stops: list[str]) -> Any:
    names = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    training = SimpleNamespace(do_train=True, **dict.fromkeys(names))
    return SimpleNamespace(settings=SimpleNamespace(training=training), control=SimpleNamespace(stop=stops.append))


def test_it_stops_where_transformers_does() -> None:
    """Its callback, in 60 sequences: see fixtures/make_transformers.py."""
    stopped = 0
    for case in CASES:
        plugin, stops, counts = plugin_of(case), list[str](), list[int]()
        for number, value in enumerate(case["values"], 1):
            plugin.sft_evaluated(a_run(stops), {"step": 10 * number, "score": value})
            counts.append(plugin.sft_state(a_run(stops))["without"])
            if stops:
                break
        assert counts == case["counts"]
        assert (len(counts) if stops else None) == case["stops_after"]
        stopped += bool(stops)
    assert stopped > 50


def test_one_that_is_restored_after_any_evaluation_stops_there_too() -> None:
    for case in CASES[:20]:
        plugin, stops = plugin_of(case), list[str]()
        for number, value in enumerate(case["values"][: len(case["counts"])], 1):
            state = json.loads(json.dumps(plugin.sft_state(a_run(stops))))
            plugin = plugin_of(case)
            plugin.sft_restore(a_run(stops), state)
            plugin.sft_evaluated(a_run(stops), {"step": number, "score": value})
            assert bool(stops) == (number == case["stops_after"])


def test_a_number_that_is_missing_is_no_improvement() -> None:
    """A plugin's may not be finite, and is then left out."""
    plugin, stops = plugin_of({"patience": 2, "threshold": 0.0, "greater": True}), list[str]()
    for step, record in enumerate([{"score": 1.0}, {}, {"score": 2.0}, {}, {}], 1):
        plugin.sft_evaluated(a_run(stops), {"step": step, **record})
        assert bool(stops) == (step == 5)
    assert stops == ["early-stopping: score is nan, and has not risen above 2.0000 in 2 evaluations"]


class Judge(sft.Plugin):
    """Measures what the test says after each step."""

    name = "judge"
    api_version = 1
    values = (5.0, 4.0, 4.5, 4.2, 4.1, 1.0)

    @sft.hookimpl
    def sft_metrics(self, run: sft.Run, record: dict[str, Any]) -> dict[str, float]:
        return {"score": self.values[run.step - 1] if run.step else 0.0} if "eval_loss" in record else {}


SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "early_stopping_patience": 3,
    "early_stopping_metric": "judge/score",
    "early_stopping_greater_is_better": False,
}


def test_a_run_stops_and_says_why(train: Train, tmp_path: Path) -> None:
    said: list[str] = []
    summary = train("out", (Judge,), say=said.append, **SETTINGS)
    reason = "early-stopping: judge/score is 4.1000, and has not fallen below 4.0000 in 3 evaluations"
    assert summary.stopped_early == {"step": 5, "reason": reason}
    assert (
        "early-stopping: by judge/score, after 3 evaluations without an improvement; the run ends with its last "
        "weights (load_best_model_at_end)" in said
    )


def test_a_run_that_it_does_not_stop_is_the_one_without_it(train: Train) -> None:
    without, beside = train("without", plugin=[]), train("with")
    assert beside.stopped_early is None
    assert read_metrics(beside.output_dir, same=True) == read_metrics(without.output_dir, same=True)
    learned = [(one.output_dir / "model.safetensors").read_bytes() for one in (beside, without)]
    assert learned[0] == learned[1]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_that_was_killed_in_between_stops_at_the_same_step(train: Train, tmp_path: Path, step: int) -> None:
    whole = train("whole", (Judge,), **SETTINGS)

    class Kill(sft.Plugin):
        name = "kill"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == step + 1:
                raise sft.SftError("killed")

    with pytest.raises(sft.SftError, match="killed"):
        train("out", (Judge, Kill), **SETTINGS)
    resumed = train("out", (Judge,), resume_from_checkpoint="auto", **SETTINGS)
    assert resumed.stopped_early == whole.stopped_early
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_options_may_change_when_a_run_goes_on(train: Train, tmp_path: Path) -> None:
    """It does not change what is learned, so nothing keeps a user from being more patient."""
    train("out", (Judge,), **SETTINGS)
    named = str(tmp_path / "out" / "checkpoint-3")
    patient = {**SETTINGS, "early_stopping_patience": 10}
    assert train("out", (Judge,), resume_from_checkpoint=named, **patient).steps == 6
    said: list[str] = []
    other = {**SETTINGS, "early_stopping_metric": None, "early_stopping_greater_is_better": None}
    assert train("again", (), resume_from_checkpoint=named, say=said.append, **other).steps == 6
    assert "note: early-stopping went by judge/score, and now goes by eval_loss: it counts anew" in said


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"evaluation_strategy": "no"}, "evaluation_strategy is no; set it to steps or epoch"),
        ({"early_stopping_greater_is_better": True}, "belongs to early_stopping_metric, which is not set"),
        ({"early_stopping_metric": "eval_rouge9"}, "have no number eval_rouge9; they have step, epoch, eval_loss"),
    ],
)
def test_what_it_cannot_go_by_is_refused_before_the_first_step(
    train: Train, tmp_path: Path, settings: dict[str, Any], cause: str
) -> None:
    with pytest.raises(sft.UsageError) as caught:
        train("out", max_steps=2, **settings)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("training", "options", "expected"),
    [
        ({}, {}, ("eval_loss", False)),
        ({"metric_for_best_model": "accuracy"}, {}, ("eval_accuracy", True)),
        ({"metric_for_best_model": "eval_ppl"}, {}, ("eval_ppl", False)),
        ({"metric_for_best_model": "objective"}, {}, ("eval_objective", False)),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, {}, ("eval_accuracy", False)),
        ({"greater_is_better": True}, {"early_stopping_metric": "eval_ppl"}, ("eval_ppl", False)),
        ({}, {"early_stopping_metric": "eval_objective"}, ("eval_objective", False)),
        ({}, {"early_stopping_metric": "a/b", "early_stopping_greater_is_better": False}, ("a/b", False)),
        ({"metric_for_best_model": "ppl"}, {"early_stopping_metric": "a/b"}, ("a/b", True)),
    ],
)
def test_which_number_decides_and_which_way(
    training: dict[str, Any], options: dict[str, Any], expected: tuple[str, bool]
) -> None:
    plugin = EarlyStopping(EarlyStoppingOptions(**options))
    settings = Settings(ModelArguments(), DataArguments(), GenerationArguments(), TrainingArguments(**training))
    assert plugin._metric(SimpleNamespace(settings=settings)) == expected  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_it_reads_is_not_said_to_have_no_effect(train: Train) -> None:
    said: list[str] = []
    train("out", say=said.append, max_steps=1, metric_for_best_model="accuracy")
    assert not any("metric_for_best_model" in line for line in said)
    assert any(line.startswith("early-stopping: by eval_accuracy, after 1 evaluation") for line in said)
