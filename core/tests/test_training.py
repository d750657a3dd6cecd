"""Whole runs on a tiny model: what is learned does not depend on how it is batched or repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import largest_difference, steps_of, weights_of

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

KINDS = [pytest.param({}, id="full"), pytest.param({"plugin": ["lora"]}, id="lora", marks=needs("lora"))]


# --- batches ------------------------------------------------------------------------------------------------


class MeanOfMeans(sft.Plugin):
    """The bug that every trainer had: each micro-batch counts alike, however many targets it has."""

    name = "mean-of-means"
    api_version = 1

    @sft.hookimpl
    def sft_parallel_strategy(self, run: sft.Run) -> Any:
        from sft.training.loss import batch_loss
        from sft.training.strategy import SingleProcess

        class Strategy(SingleProcess):
            def accumulate(self, learning: sft.Learning, batches: Any) -> float:
                total = 0.0
                for batch in batches:
                    loss = batch_loss(run.model, batch)
                    (loss / (batch.target_tokens * len(batches))).backward()
                    total += float(loss)
                return total

        return Strategy()


BATCHES = {"4x1": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}


def train_batched(train: Train, **settings: Any) -> None:
    """The same 4 rows a step in three ways, for 3 steps, into folders named after them."""
    for name, (rows, micro_batches) in BATCHES.items():
        train(
            name,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            max_steps=3,
            do_eval=False,
            **settings,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_gives_what_one_batch_gives(
    train: Train, metrics: Metrics, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Rates of 1e-3 move weights by up to 3e-3 in 3 steps; summing in another order is float32 noise."""
    train_batched(train, **kind)
    expected = metrics(tmp_path / "4x1")
    for name in ("2x2", "1x4"):
        found = metrics(tmp_path / name)
        assert [line["target_tokens"] for line in found] == [line["target_tokens"] for line in expected]
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)
        assert largest_difference(tmp_path / name, tmp_path / "4x1") < 1e-5


def test_trap_a_mean_of_means_would_give_something_else(train: Train, tmp_path: Path) -> None:
    """The control of the test above: with these records the bug is seen, ten times over its tolerance."""
    train_batched(train, plugins=(MeanOfMeans,))
    assert largest_difference(tmp_path / "1x4", tmp_path / "4x1") > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_itself_bit_by_bit(train: Train, metrics: Metrics, tmp_path: Path, kind: dict[str, Any]) -> None:
    for name, seed in (("first", 7), ("second", 7), ("other", 8)):
        train(name, num_train_epochs=2, per_device_train_batch_size=4, seed=seed, **kind)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert metrics(first, same=True) == metrics(second, same=True)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in set(names) - {"metrics.jsonl", "run.json", "sft.log", "report.html", "report.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert [line["loss"] for line in steps_of(metrics(other))] != [line["loss"] for line in steps_of(metrics(first))]


@needs("lora")
def test_a_run_inside_a_run_disturbs_neither(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """One run stops between two steps while another, with another plugin, model and seed, runs from end to end."""

    class Interrupt(sft.Plugin):
        name = "interrupt"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                inner("inside")

    def outer(name: str, plugins: tuple[type, ...] = ()) -> None:
        train(name, plugins, plugin=["lora"], lora_dropout=0.2, max_steps=4, evaluation_strategy="steps")

    def inner(name: str) -> None:
        train(name, max_steps=3, seed=5, learning_rate=3e-3)

    outer("outer-alone")
    inner("inner-alone")
    outer("outer", (Interrupt,))
    for found, expected in (("outer", "outer-alone"), ("inside", "inner-alone")):
        assert metrics(tmp_path / found, same=True) == metrics(tmp_path / expected, same=True)
        assert largest_difference(tmp_path / found, tmp_path / expected) == 0.0


def test_draws_of_a_step_are_a_function_of_seed_step_and_rank(paddle: Any) -> None:
    """Each of the three matters, and what was drawn before does not."""
    from sft.training.loop import seed_step

    def draw(*where: int) -> bytes:
        seed_step(*where)
        return paddle.rand([8]).numpy().tobytes()

    places = [(seed, step, rank) for seed in (1, 2) for step in (1, 2, 3) for rank in (0, 1)]
    first = [draw(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [draw(*place) for place in reversed(places)] == first[::-1]


# --- clipping -----------------------------------------------------------------------------------------------


def test_a_run_steps_with_the_clipped_gradients(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """With an epsilon that outweighs the gradients, AdamW's first step is rate·g/ε: it shrinks as they do."""
    settings = {"max_steps": 1, "adam_epsilon": 100.0, "learning_rate": 1.0, "do_eval": False}
    train("free", max_grad_norm=0, **settings)
    train("clipped", max_grad_norm=0.5, **settings)
    (norm,), (same,) = ([line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("free", "clipped"))
    assert norm == same > 0.5  # what is written down is the norm before clipping
    original = Path(json.loads((tmp_path / "free" / "run.json").read_text())["settings"]["model_name_or_path"])
    start = weights_of(original)
    free, clipped = ({n: t - start[n] for n, t in weights_of(tmp_path / f).items()} for f in ("free", "clipped"))
    ratio = sum((clipped[n] * free[n]).sum() for n in free) / sum((free[n] ** 2).sum() for n in free)
    assert ratio == pytest.approx(0.5 / norm, rel=1e-2)


# --- without training ---------------------------------------------------------------------------------------


def test_evaluation_alone_measures_and_writes_no_weights(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    trained = train("out", max_steps=3, save_strategy="steps", save_steps=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    measured = train("new", do_train=False, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert measured.eval_loss_after == trained.eval_loss_after
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["metrics.jsonl", "report.html", "report.json", "run.json", "sft.log"]
    base = train("base", do_train=False)
    assert base.eval_loss_after == trained.eval_loss_before
    # A run's own folder is not touched.
    with pytest.raises(sft.UsageError, match="already holds a run"):
        train("out", do_train=False, resume_from_checkpoint="auto")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


def test_neither_training_nor_evaluation_is_refused(train: Train) -> None:
    with pytest.raises(sft.UsageError, match="do_train and do_eval are both false"):
        train(do_train=False, do_eval=False)
