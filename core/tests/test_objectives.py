"""What a run minimises, through toy plugins: it is obeyed, measured, logged and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_plugins import active, providing, toy

import sft
from sft.settings.checks import check_plugins

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]


class OfRows:
    """Twice the cross-entropy of each row's targets, and a mean over rows."""

    values = ("nats/sum", "nats/first")

    def __init__(self, run: sft.Run) -> None:
        self.run = run

    def weight(self, batch: sft.Batch) -> float:
        return float(len(batch.labels))

    def loss(self, losses: sft.Losses, hidden: Any, batch: sft.Batch) -> Any:
        each = losses.each(hidden, batch.labels)
        loss = losses.total(hidden, batch.labels)
        assert float(loss) == pytest.approx(each.sum(), rel=1e-5)
        return loss * 2.0, (each.sum(), each[0].sum())


Rows = providing("sft_objective", OfRows, "rows")


def test_an_objective_is_minimised_measured_and_logged(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    watch = toy("watch", sft_step_ended=lambda self, record: seen.append(record))
    settings = {"max_steps": 3, "logging_steps": 3, "evaluation_strategy": "steps", "eval_steps": 3}
    said: list[str] = []
    summary = train("rows", (Rows, watch), said.append, **settings)
    train("plain", **settings)
    rows, plain = (metrics(tmp_path / name) for name in ("rows", "plain"))
    before, first, last, after = rows
    assert before["eval_loss"] == plain[0]["eval_loss"]  # plain cross-entropy all the same
    assert before["eval_nats/sum"] * 7 == pytest.approx(before["eval_loss"] * summary.data["dev"]["target_tokens"])
    for line in (before, after):
        assert line["eval_objective"] == pytest.approx(2 * line["eval_nats/sum"])
        assert 0 < line["eval_nats/first"] < line["eval_nats/sum"]
    assert "eval_objective" not in plain[0]
    assert first["nats/sum"] * 8 == pytest.approx(plain[1]["loss"] * plain[1]["target_tokens"], rel=1e-6)  # 8 rows
    for name in ("nats/sum", "nats/first"):
        assert first[name] == seen[0][name]
        assert last[name] == pytest.approx((seen[1][name] + seen[2][name]) / 2)
    assert last["loss"] == pytest.approx(2 * last["nats/sum"])
    assert any(f"nats/sum {last['nats/sum']:.4g}" in line and line.startswith("step 3/3 ") for line in said)
    assert any(f"objective {after['eval_objective']:.4f}" in line for line in said)


@pytest.mark.slow
def test_values_of_an_objective_go_on_when_a_run_does(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    """A line over steps before and after the stop."""
    settings = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train("whole", (Rows,), **settings)
    train("again", (Rows,), resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **settings)
    assert metrics(tmp_path / "again", same=True) == metrics(tmp_path / "whole", same=True)


@pytest.mark.slow
def test_the_loss_of_tokens_is_learned_and_cross_entropy_measured(
    train: Train, metrics: Metrics, tmp_path: Path
) -> None:
    """Two plugins: the later one, by its order, gets what the other has made."""
    three = providing("sft_token_loss", lambda run: SimpleNamespace(loss=lambda targets, before: before * 3.0), "three")
    one = providing("sft_token_loss", lambda run: SimpleNamespace(loss=lambda targets, before: before + 1.0), "one")
    one.order = 5
    train("other", (one, three), max_steps=1)
    train("plain", max_steps=1)
    other, plain = (metrics(tmp_path / name) for name in ("other", "plain"))
    assert other[0]["eval_loss"] == plain[0]["eval_loss"]
    assert other[0]["eval_objective"] == pytest.approx(3 * plain[0]["eval_loss"] + 1)
    assert other[1]["loss"] == pytest.approx(3 * plain[1]["loss"] + 1)
    assert other[1]["grad_norm"] == pytest.approx(3 * plain[1]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_the_best_model_may_be_that_of_the_objective(train: Train) -> None:
    """The highest, which is that of the first step: cross-entropy would take the last."""
    said: list[str] = []
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "evaluation_strategy": "steps"}
    settings |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "objective"}
    train("out", (Rows,), said.append, **settings, greater_is_better=True)
    assert any(line.startswith("best model: checkpoint-1, eval_objective ") for line in said)
    with pytest.raises(sft.UsageError, match="objective: what this run minimises is cross-entropy, which is loss"):
        train("plain", **settings)


def test_an_objective_beside_the_loss_of_tokens_is_refused() -> None:
    token = providing("sft_token_loss", lambda run: None, "heavy")
    with pytest.raises(sft.UsageError, match="rows minimises something else than the loss of tokens, which heavy cha"):
        check_plugins(active(extra=(Rows, token)))


@pytest.mark.slow
def test_an_objective_that_nobody_gives_is_cross_entropy(train: Train, metrics: Metrics, tmp_path: Path) -> None:
    train("none", (providing("sft_objective", lambda run: None),), max_steps=1)
    train("plain", max_steps=1)
    assert metrics(tmp_path / "none", same=True) == metrics(tmp_path / "plain", same=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"values": ("loss",)}, "a value called loss, where a name such as part/loss is expected"),
        ({"loss": lambda *given: (given[1].sum(), ())}, "0 values where 2 have names"),
        ({"loss": lambda *given: given[1].sum()}, "where a tuple is expected"),
        ({"loss": lambda *given: given[1].nothing}, "AttributeError"),
    ],
)
def test_a_wrong_objective_is_its_plugins_fault(train: Train, changed: dict[str, Any], said: str) -> None:
    given = SimpleNamespace(**{"values": ("a/b", "a/c"), "weight": lambda batch: 1.0, "loss": None, **changed})
    with pytest.raises(sft.PluginError) as caught:
        train("out", (providing("sft_objective", lambda run: given, "wrong"),), max_steps=1, do_eval=False)
    assert said in str(caught.value)
    assert str(caught.value).startswith("Plugin wrong ")


def test_an_objective_is_refused_where_layers_are_elsewhere(train: Train) -> None:
    from sft.distributed.parts import mark_stage
    from sft.training.strategy import SingleProcess

    class Staged(SingleProcess):
        def connect(self, model: Any) -> None:
            mark_stage(next(iter(model.parameters())), 1, here=False)

        def parameters(self, model: Any) -> Any:
            return list(model.named_parameters())

    strategy = providing("sft_parallel_strategy", lambda run: Staged(), "stages")
    with pytest.raises(sft.UsageError, match=r"Plugin rows .* leave pipeline parallelism out"):
        train("out", (Rows, strategy), max_steps=1)
