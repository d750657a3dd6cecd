"""A step whose loss or gradient is not finite: which records it had, and whether it ends the run or is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped_runs import StoppedError, checkpoints_of, contents, stopping_when_saved

import sft
from sft.files import read_report
from sft.testing import write_data

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

PLAIN = {"per_device_train_batch_size": 2, "do_eval": False, "logging_steps": 1}
SAVING = {"save_strategy": "steps", "save_steps": 1}


ANSWERS = ["d" if line % 3 == 1 else "d" + " e" * line for line in range(1, 13)]
"""Of an answer of one token nothing is learned where nothing stands before it; the others can be told by length."""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Data and a template that writes the answers alone."""
    data = write_data(tmp_path / "data", [{"src": "a", "tgt": answer} for answer in ANSWERS])
    template = "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    (tmp_path / "answer.jinja").write_text(template)
    return {**PLAIN, "dataset_name_or_path": str(data), "chat_template": str(tmp_path / "answer.jinja")}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``poison(3, 4)``: the losses of micro-batches 3 and 4 of runs from now on, from 1, are not a number."""
    from sft.training import objective

    own = objective.target_loss

    def switch(*numbers: int, value: float = float("nan")) -> None:
        count = itertools.count(1)

        def loss(*arguments: Any) -> Any:
            found = own(*arguments)
            return found * value if next(count) in numbers else found

        monkeypatch.setattr(objective, "target_loss", loss)

    return switch


def looking(widths: dict[int, list[int]]) -> type[sft.Plugin]:
    """A plugin that notes the lengths of the records of each step."""

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            widths.setdefault(len(widths) + 1, []).extend(length for row in batch.lengths for length in row)

    return Look


def lines_in(text: str) -> list[int]:
    return [int(line) for line in re.findall(r"train\.json, line (\d+)", text)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_it_names_its_records(
    train: Train, models: Path, settings: dict[str, Any], poison: Callable[..., None], lazy: bool, broken: bool
) -> None:
    """By file and line, as they stand there, with those before them that keep no target or cannot be read."""
    from sft.data.tokenizer import Tokenizer

    poison(3)
    lengths: dict[int, list[int]] = {}
    if broken:
        path = Path(settings["dataset_name_or_path"]) / "train.json"
        path.write_text("{no record}\n" + path.read_text().partition("\n")[2])
        settings |= {"on_bad_record": "skip", "on_bad_record_limit": 0.5}
    with pytest.raises(sft.SftError, match=r"no longer finite at step 3 \(loss nan, .*\), with 2 records") as caught:
        train("out", (looking(lengths),), max_steps=4, lazy=lazy, **settings)
    named = lines_in(str(caught.value))
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    added = {length - len(tokenizer.encode(ANSWERS[line - 1])) for line, length in zip(named, lengths[3], strict=True)}
    assert len(named) == 2
    assert len(added) == 1  # an end of text, and labels are shifted by one
    assert len(set(lengths[3])) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_it_can_be_left_out(
    train: Train, metrics: Metrics, tmp_path: Path, poison: Callable[..., None], value: float
) -> None:
    """The others are as they are without it; it is said and counted, and the schedule and the data go on."""
    said: list[str] = []
    poison(3, value=value)
    summary = train("out", say=said.append, max_steps=5, skip_nan_grad=True, **SAVING, **PLAIN)
    assert (summary.steps, summary.skipped_steps) == (5, 1)
    (line,) = [line for line in said if "skipped" in line]
    assert re.match(
        r"step 3: skipped, for it is not finite \(loss (nan|inf), .*with 2 records \(\S+train\.json, li", line
    )
    assert line in sft.read_run(tmp_path / "out").notes
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 2, 4, 5]
    assert contents(tmp_path / "out" / "checkpoint-3") == contents(tmp_path / "out" / "checkpoint-2")
    assert contents(tmp_path / "out" / "checkpoint-4") != contents(tmp_path / "out" / "checkpoint-3")


def test_a_resumed_run_counts_on(train: Train, tmp_path: Path, poison: Callable[..., None]) -> None:
    """Step 2 is left out before the run is stopped, and 3 after it: together they are too many."""
    settings = {"max_steps": 6, "skip_nan_grad": True, "max_skipped_in_a_row": 2, **SAVING, **PLAIN}
    poison(2)
    with pytest.raises(StoppedError):
        train("out", (stopping_when_saved(2),), **settings)
    poison(1)
    message = (
        r"finite at step 3 .*, which is the last of 2 in a row \(max_skipped_in_a_row\); lower .*checkpoint-2, or "
        r"start again if that fails too, for no step has been taken from it\."
    )
    with pytest.raises(sft.SftError, match=message):
        train("out", resume_from_checkpoint="auto", **settings)
    poison(3)  # from step 3 on
    assert train("out", resume_from_checkpoint="auto", **settings).skipped_steps == 2


@pytest.mark.parametrize(
    ("skips", "last"), [({}, 5), ({"skip_nan_grad": True, "max_skipped_in_a_row": 4}, 8)], ids=["ends", "skips"]
)
def test_the_checkpoint_before_the_ruin_stays(train: Train, tmp_path: Path, skips: dict[str, Any], last: int) -> None:
    """Step 4 leaves weights that are finite, and of which no loss is. They are saved as it ends, and as the steps after
    it are skipped; yet ``save_total_limit 1`` does not make the good one go, and it is the one that is named."""

    class Ruin(sft.Plugin):
        name = "ruin"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            left.append(checkpoints_of(run.output_dir))
            if record["step"] == 4 and "good" not in str(run.output_dir):
                parameter = dict(run.model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
                parameter.set_value(np.full(parameter.shape, 1e38, np.float32))

    left: list[list[str]] = []
    settings = {**SAVING, **PLAIN, **skips, "save_total_limit": 1, "max_steps": 9}
    with pytest.raises(sft.SftError, match=rf"not? ?.*finite at step {last} .*resume from \S+checkpoint-3\.$"):
        train("out", (Ruin,), **settings)
    named = tmp_path / "out" / "checkpoint-3"
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3", f"checkpoint-{max(4, last - 1)}"]
    with pytest.raises(sft.SftError, match=r"resume from \S+checkpoint-3\.$"):  # it is not removed by the next try
        train("out", (Ruin,), resume_from_checkpoint="auto", **settings)
    left.clear()
    train("good", (Ruin,), resume_from_checkpoint=str(named), **settings)
    assert left == [
        [],
        *([f"checkpoint-{step}"] for step in range(4, 9)),
    ]  # the older one has gone when a step is taken
    assert checkpoints_of(tmp_path / "good") == ["checkpoint-9"]


def ruining(value: float) -> type[sft.Plugin]:
    """A plugin that sets weights to ``value`` after step 3."""

    class Ruin(sft.Plugin):
        name = "ruin"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                parameter = dict(run.model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
                parameter.set_value(np.full(parameter.shape, value, np.float32))

    return Ruin


@pytest.mark.slow
def test_a_run_that_skips_steps_to_its_end_leaves_the_good_checkpoint(
    train: Train, tmp_path: Path, poison: Callable[..., None]
) -> None:
    settings = {**SAVING, **PLAIN, "save_total_limit": 1, "max_steps": 4, "skip_nan_grad": True}
    poison(3, 4)
    said: list[str] = []
    assert train("out", **settings, say=said.append).skipped_steps == 2
    assert any(
        "the last 2 steps were skipped" in line and line.endswith(f"take those of {tmp_path / 'out' / 'checkpoint-1'}")
        for line in said
    )
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]
    poison(3)
    assert train("whole", **settings, say=said.append).skipped_steps == 1
    assert sum("skipped, so nothing shows" in line for line in said) == 1
    assert checkpoints_of(tmp_path / "whole") == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 9])
def test_the_checkpoint_of_another_run_is_named_if_a_step_was_taken_from_it(
    train: Train, tmp_path: Path, saves: int
) -> None:
    """Whatever its name is now, and also where this run has saved after it, for what it saved is ruined."""

    settings = {**SAVING, **PLAIN, "max_steps": 5}
    with pytest.raises(StoppedError):
        train("first", (stopping_when_saved(2),), **settings)
    good = (tmp_path / "first" / "checkpoint-2").rename(tmp_path / "good")
    settings |= {"save_steps": saves, "resume_from_checkpoint": str(good)}
    with pytest.raises(sft.SftError, match=rf"finite at step 4 .*, and resume from {good}\.$"):
        train("out", (ruining(1e38),), **settings)


def test_a_model_that_is_not_finite_is_not_skipped_over(train: Train, tmp_path: Path) -> None:
    """No other step would be better. The last good checkpoint stays."""

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    message = (
        r"finite at step 4 \(.*\), with 2 records \(.*\); model\.layers\.1\.mlp\.up_proj\.weight holds values .*-2\."
    )
    with pytest.raises(sft.SftError, match=message):
        train("out", (ruining(np.nan),), skip_nan_grad=True, **settings, **PLAIN)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert read_report(tmp_path / "out")["status"] == "failed"
