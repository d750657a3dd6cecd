"""Plugins that only watch: they neither change nor end a run; and plugins that measure something of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import SETTINGS, contents
from toy_plugins import active, refusal, toy

import sft
from sft import hookspecs
from sft.plugins.calls import EVENTS, WATCHING

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]
WHO = "Plugin toy (given directly as Toy)"


def observer(**hooks: Callable[..., Any]) -> type[sft.Plugin]:
    plugin = toy(**hooks)
    plugin.observes = True
    return plugin


def raising(error: BaseException) -> Callable[..., Any]:
    def fails(self: Any, run: sft.Run) -> Any:
        raise error

    return fails


# --- what goes wrong in one ---------------------------------------------------------------------------------


def test_what_is_named_as_an_event_is_a_hook() -> None:
    assert set(WATCHING) <= set(vars(hookspecs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        ValueError("no\nroom"),
        pytest.param(sft.SftError("The server is away."), marks=pytest.mark.slow),
        pytest.param(SystemExit(3), marks=pytest.mark.slow),
    ],
)
def test_the_errors_of_an_observer_are_said_once_and_end_nothing(
    train: Train, tmp_path: Path, whole: Callable[..., Path], error: BaseException
) -> None:
    said: list[str] = []
    plugin = observer(**{hook: raising(error) for hook in EVENTS})
    train("out", (plugin,), say=said.append, **SETTINGS)
    found, wanted = contents(tmp_path / "out"), contents(whole())
    assert {name: found[name] for name in wanted} == wanted
    notes = [line for line in said if "it only watches" in line]
    cause = {
        ValueError: "(ValueError: no room)",
        sft.SftError: "(The server is away)",
        SystemExit: "(SystemExit: 3)",
    }[type(error)]
    assert notes == [
        f"note: {WHO} failed in {hook} {cause}; it only watches, so the run goes on, and this is not said again"
        for hook in ("sft_run_record", "sft_metrics", "sft_evaluated", "sft_logged", "sft_run_started", "sft_state")
        + ("sft_micro_batch", "sft_step_ended", "sft_checkpoint_saved", "sft_run_ended")
    ]


def test_a_wrong_answer_of_an_observer_is_none(train: Train) -> None:
    said: list[str] = []
    plugin = observer(sft_metrics=lambda self: {"a": "text"}, sft_state=lambda self: 3)
    train("out", (plugin,), say=said.append, max_steps=1, do_eval=False, save_strategy="epoch")
    assert [line for line in said if "only watches" in line] == [
        f"note: {WHO} answers sft_state with an int (3) where a dict is expected; it only watches, so the run goes on, "
        "and this is not said again",
        f"note: {WHO} answers sft_metrics with a dict whose 'a' is a str ('text') where a number is expected; it only "
        "watches, so the run goes on, and this is not said again",
    ]


@pytest.mark.slow
def test_what_another_plugin_raises_still_ends_the_run(train: Train) -> None:
    with pytest.raises(sft.PluginError, match="failed in sft_step_ended"):
        train("out", (toy(sft_step_ended=raising(ValueError("x"))),), max_steps=1)


@pytest.mark.slow
def test_a_signal_in_an_observer_is_a_signal(train: Train) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("out", (observer(sft_step_ended=raising(KeyboardInterrupt())),), max_steps=1)


@pytest.mark.slow
def test_an_observer_may_refuse_settings_before_anything_has_begun(train: Train) -> None:
    with pytest.raises(sft.UsageError, match="not so"):
        train("out", (observer(sft_check=raising(sft.UsageError("not so"))),))


def test_an_observer_asks_nothing_of_the_run(train: Train) -> None:
    said: list[str] = []
    plugin = observer(sft_step_ended=lambda self, run: run.control.stop("because"))
    assert train("out", (plugin,), say=said.append, max_steps=2, do_eval=False).steps == 2
    assert f"{WHO} failed in sft_step_ended (RuntimeError: a plugin that only watches (observes = True) asks the" in (
        "\n".join(said)
    )


def test_who_does_more_than_watch_is_no_observer() -> None:
    assert refusal(extra=(observer(sft_adapt_model=lambda self: None),)) == (
        f"{WHO} only watches (observes = True), and implements sft_adapt_model, which does more; take one of them away."
    )
    wrapping = toy()
    wrapping.sft_step_ended = sft.hookimpl(wrapper=True)(lambda self: (yield))  # type: ignore[attr-defined]
    wrapping.observes = True
    assert refusal(extra=(wrapping,)) == (
        f"{WHO} only watches (observes = True), and wraps others' answers to sft_step_ended, which does more; take one "
        "of them away."
    )
    both = observer()
    both.shaping = True
    assert refusal(extra=(both,)) == (
        f"{WHO} only watches (observes) and changes what is learned (shaping); take one of them away."
    )


def nothing(self: Any) -> None: ...


# --- shaping ------------------------------------------------------------------------------------------------


def test_a_plugin_says_itself_whether_it_changes_what_is_learned() -> None:
    inferred, says_no, says_yes = toy("a", sft_adapt_model=nothing), toy("b", sft_adapt_model=nothing), toy("c")
    says_no.shaping, says_yes.shaping = False, True
    assert active(extra=(inferred, says_no, says_yes)).shaping() == ["a", "c"]


@pytest.mark.parametrize(("name", "wrong"), [("shaping", "no"), ("shaping", 0), ("observes", None), ("observes", 1)])
def test_what_is_no_answer_to_that(name: str, wrong: Any) -> None:
    plugin = toy()
    setattr(plugin, name, wrong)
    words = {"shaping": "True, False or None", "observes": "True or False"}[name]
    assert refusal(extra=(plugin,)) == f"{WHO} is not well formed: {name} is {wrong!r}, not {words}; upgrade it."


# --- numbers of one's own -----------------------------------------------------------------------------------


class Counts(sft.Plugin):
    """Counts micro-batches, and measures something that is not always there."""

    name = "counts"
    api_version = 1

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.batches, self.logged = 0, list[dict[str, Any]]()

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run) -> None:
        self.batches += 1

    @sft.hookimpl
    def sft_metrics(self, run: sft.Run, record: dict[str, Any]) -> dict[str, float]:
        found: dict[str, float] = {"evaluations": 1.0} if "eval_loss" in record else {"batches": self.batches}
        if record["step"] % 2 == 0:
            found["sometimes"] = float("nan")
        record.clear()
        return found

    @sft.hookimpl
    def sft_logged(self, run: sft.Run, record: dict[str, Any]) -> None:
        LOGGED.append(record)


LOGGED: list[dict[str, Any]] = []


def test_numbers_of_a_plugin_stand_in_the_lines_under_its_name(train: Train, tmp_path: Path, metrics: Metrics) -> None:
    LOGGED.clear()
    said: list[str] = []
    settings = {"max_steps": 4, "logging_steps": 2, "evaluation_strategy": "steps", "eval_steps": 4}
    seen: list[dict[str, Any]] = []
    watch = toy(sft_evaluated=lambda self, record: seen.append(record))
    train("out", (Counts, watch), say=said.append, gradient_accumulation_steps=2, **settings)
    lines = metrics(tmp_path / "out")
    assert lines == LOGGED  # each line that is written, as it is written
    assert [(line["step"], line.get("counts/batches"), line.get("counts/evaluations")) for line in lines] == [
        *((0, None, 1.0), (1, 2, None), (2, 4, None), (4, 8, None), (4, None, 1.0)),
    ]
    assert [line["counts/evaluations"] for line in seen] == [1.0, 1.0]
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert said.count("note: counts/sometimes is nan at step 0; it is left out where it is not finite") == 1
    assert any(line.startswith("step 2/4  ") and line.endswith("  counts/batches 4") for line in said)
    state = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert state["status"] == "finished"


@pytest.mark.parametrize("answer", [{"a": None}, {1: 2.0}, [1.0]])
def test_what_is_no_number_is_the_plugins_fault(train: Train, answer: Any) -> None:
    with pytest.raises(sft.PluginError, match="answers sft_metrics with"):
        train("out", (toy(sft_metrics=lambda self: answer),), max_steps=1, do_eval=False)


# --- why state is restored ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plugin_is_told_why_its_state_is_restored(train: Train, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plugin = toy(
        sft_state=lambda self: {"kept": 1},
        sft_restore=lambda self, run, why, step: told.append((why, step, run.step)),
    )
    steps = {"save_strategy": "steps", "evaluation_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    settings = {**steps, "load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 1e-2}
    train("out", (plugin,), max_steps=2, **settings)
    best = told.pop()
    assert best == ("best", 1, 2)  # the loss falls, and the greatest is to be the best
    train("out", (plugin,), resume_from_checkpoint="auto", max_steps=3, **settings)
    assert told.pop(0) == ("resume", 2, 2)
    told.clear()
    train("measured", (plugin,), do_train=False, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert told == [("measure", 1, 1)]
