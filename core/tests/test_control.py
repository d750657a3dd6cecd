"""What hooks and files ask of a run: done once, after the step, in all its processes; and an early end is an end."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stopped_runs import SETTINGS, StoppedError, checkpoints_of, contents, stopping, stopping_when_saved, watching
from toy_plugins import toy

import sft
from sft.control import Control
from sft.stopping import Stop
from sft.training.wishes import Wishes

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]

CONSTANT = {**SETTINGS, "lr_scheduler_type": "constant", "save_strategy": "no", "evaluation_strategy": "no"}
"""Of such a run the first steps are those of a shorter one."""
CONSTANT.pop("warmup_steps")
RESULT = ("model.safetensors",)


def asking(step: int, ask: Callable[[sft.Run], None], hook: str = "sft_step_ended") -> type[sft.Plugin]:
    """A plugin that asks in ``hook`` of ``step``."""

    def asks(self: Any, run: sft.Run) -> None:
        if run.step == step:
            ask(run)

    return toy("asks", **{hook: asks})


def stop(run: sft.Run) -> None:
    run.control.stop("it is\n enough")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULT}


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def short(train_once: Callable[..., Path]) -> Path:
    """A run of five steps."""
    return train_once("five", **{**CONSTANT, "max_steps": 5})


@pytest.fixture(scope="module")
def train_once(tmp_path_factory: pytest.TempPathFactory, base_model: Path, dataset: Path) -> Callable[..., Path]:
    def make(name: str, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("once") / name
        places = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(dataset)}
        sft.run({**places, "output_dir": str(folder), "learning_rate": 1e-3, "device": "cpu", **settings})
        return folder

    return make


# --- stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["sft_step_ended", pytest.param("sft_micro_batch", marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_ends_as_after_its_last_step(
    train: Train, tmp_path: Path, short: Path, hook: str, metrics: Metrics
) -> None:
    said: list[str] = []
    step = 5 if hook == "sft_step_ended" else 4  # while the fifth is made, run.step is 4
    summary = train("out", (asking(step, stop, hook),), say=said.append, **CONSTANT)
    early = {"step": 5, "reason": "it is enough"}
    assert (summary.steps, summary.stopped_early) == (5, early)
    assert report(tmp_path / "out")["status"] == "finished"
    assert report(tmp_path / "out")["result"]["stopped_early"] == early
    assert weights(tmp_path / "out") == weights(short)
    assert "step 5/13: the run ends early (it is enough)" in said
    found = metrics(tmp_path / "out", same=True)
    assert found == metrics(short, same=True)  # the last step has its line, and an evaluation follows
    assert summary.eval_loss_after == found[-1]["eval_loss"]


@pytest.mark.slow
def test_an_end_that_is_asked_for_after_an_evaluation_is_that_of_its_step(
    train: Train, tmp_path: Path, metrics: Metrics
) -> None:
    settings = {**CONSTANT, "evaluation_strategy": "steps", "eval_steps": 5, "save_strategy": "epoch"}
    summary = train("out", (asking(5, stop, "sft_evaluated"),), **settings)
    assert summary.steps == 5
    assert [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line] == [0, 5]
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 4, 5]
    # The epoch that it cuts short ends there, as one does that max_steps cuts short.
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-5"]


@pytest.mark.slow
def test_what_is_asked_before_the_first_step_is_done_after_it(train: Train) -> None:
    assert train("out", (asking(0, stop, "sft_run_started"),), **CONSTANT).steps == 1


@pytest.mark.slow
def test_a_stop_after_the_last_step_is_none(train: Train, tmp_path: Path) -> None:
    summary = train("out", (asking(5, stop),), **{**CONSTANT, "max_steps": 5})
    assert (summary.steps, summary.stopped_early) == (5, None)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["", " ", None])
def test_a_stop_without_a_reason_is_the_plugins_fault(train: Train, reason: Any) -> None:
    with pytest.raises(sft.PluginError, match=r"run\.control\.stop needs a reason"):
        train("out", (asking(1, lambda run: run.control.stop(reason)),), **CONSTANT)


# --- save and evaluate --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_that_is_asked_for_is_one_to_go_on_from(
    train: Train, tmp_path: Path, train_once: Callable[..., Path]
) -> None:
    whole = train_once("thirteen", **CONSTANT)

    with pytest.raises(StoppedError):
        train("out", (asking(7, lambda run: run.control.save()), stopping(9)), **CONSTANT)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-7"]
    steps: list[int] = []
    train("out", (watching(steps),), resume_from_checkpoint="auto", **CONSTANT)
    assert steps == [8, 9, 10, 11, 12, 13]
    assert weights(tmp_path / "out") == weights(whole)


@pytest.mark.slow
def test_an_evaluation_that_is_asked_for_changes_nothing_that_is_learned(
    train: Train, tmp_path: Path, short: Path, metrics: Metrics
) -> None:
    train("out", (asking(3, lambda run: run.control.evaluate()),), **{**CONSTANT, "max_steps": 5})
    assert [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line] == [0, 3, 5]
    assert weights(tmp_path / "out") == weights(short)


@pytest.mark.slow
def test_what_is_due_anyway_is_done_once(train: Train, tmp_path: Path, metrics: Metrics) -> None:
    def both(run: sft.Run) -> None:
        run.control.save()
        run.control.evaluate()

    settings = {"max_steps": 2, "evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    train("out", (asking(1, both),), save_steps=1, **settings)
    assert [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line] == [0, 1, 2]
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
def test_an_evaluation_without_dev_data_is_said_to_be_none(train: Train, dataset: Path) -> None:
    said: list[str] = []
    asks = toy(sft_step_ended=lambda self, run: run.control.evaluate())
    train("out", (asks,), say=said.append, max_steps=2, do_eval=False)
    note = "note: an evaluation was asked for, and there is no dev data to measure, so none is made"
    assert said.count(note) == 1


@pytest.mark.slow
def test_a_file_that_asks_for_what_cannot_be_goes_too(train: Train, tmp_path: Path) -> None:
    said: list[str] = []
    asks = toy(sft_step_ended=lambda self, run: (run.output_dir / "EVALUATE").touch() if run.step == 1 else None)
    train("out", (asks,), say=said.append, max_steps=2, do_eval=False)
    assert any("there is no dev data to measure" in line for line in said)
    assert not (tmp_path / "out" / "EVALUATE").exists()


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_has_ended_early_does_not_go_on_by_itself(train: Train, tmp_path: Path) -> None:
    settings = {**CONSTANT, "save_strategy": "steps"}
    train("out", (asking(5, stop),), **settings)
    before = contents(tmp_path / "out", ())
    with pytest.raises(sft.UsageError) as caught:
        train("out", resume_from_checkpoint="auto", **settings)
    named = tmp_path / "out" / "checkpoint-3"
    assert str(caught.value) == (
        f"output_dir {tmp_path / 'out'} holds a run that has finished early, after step 5 (it is enough), so it does "
        f"not go on by itself; to train on, name the checkpoint (--resume_from_checkpoint {named}), or replace the run "
        "with --overwrite_output_dir."
    )
    assert contents(tmp_path / "out", ()) == before
    assert train("out", resume_from_checkpoint=str(named), **settings).steps == 13


@pytest.mark.slow
def test_one_that_was_killed_as_it_ended_early_ends_there(train: Train, tmp_path: Path, short: Path) -> None:
    """Its last checkpoint says that no step follows; a user who names it lets it go on."""
    settings = {**CONSTANT, "save_strategy": "steps", "save_steps": 5}
    with pytest.raises(StoppedError):
        train("out", (asking(5, stop), stopping_when_saved(5)), **settings)
    shutil.copytree(tmp_path / "out", tmp_path / "named")
    said: list[str] = []
    summary = train("out", resume_from_checkpoint="auto", say=said.append, **settings)
    assert (summary.steps, summary.stopped_early) == (5, {"step": 5, "reason": "it is enough"})
    assert "the run ended early after step 5 (it is enough), so no step follows" in said
    assert weights(tmp_path / "out") == weights(short)
    named = str(tmp_path / "named" / "checkpoint-5")
    summary = train("named", resume_from_checkpoint=named, say=said.append, **settings)
    assert (summary.steps, summary.stopped_early) == (13, None)
    assert "note: the run ended early after step 5 (it is enough), and now goes on, for its checkpoint is named" in said


# --- files --------------------------------------------------------------------------------------------------


def test_files_in_the_folder_ask_too_and_go_when_they_have_been_obeyed(
    train: Train, tmp_path: Path, short: Path, metrics: Metrics
) -> None:
    folder, said = tmp_path / "out", list[str]()
    left: list[set[str]] = []

    def touch(self: Any, run: sft.Run, record: dict[str, Any]) -> None:
        left.append({name for name in ("STOP", "SAVE", "EVALUATE") if (folder / name).exists()})
        if record["step"] == 2:
            (folder / "EVALUATE").touch()
        if record["step"] == 3:
            (folder / "SAVE").touch()
        if record["step"] == 5:
            (folder / "STOP").write_text("the machine\nis needed \x1b[2J", encoding="utf-8")

    summary = train("out", (toy(sft_step_ended=touch),), say=said.append, **CONSTANT)
    reason = f"the file {folder / 'STOP'} asks for it: the machine is needed"
    assert summary.stopped_early is not None
    assert summary.stopped_early["reason"].startswith(reason)
    assert "\x1b" not in summary.stopped_early["reason"]
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [0, 2, 5]
    assert f"the dev data has been measured, as the file EVALUATE in {folder} asked" in said
    assert checkpoints_of(folder) == ["checkpoint-3"]
    assert f"checkpoint-3 has been written, as the file SAVE in {folder} asked" in said
    assert left == [set()] * 5
    assert not (folder / "STOP").exists()
    assert weights(folder) == weights(short)


@pytest.mark.slow
def test_a_file_that_was_there_before_is_nobodys_order(train: Train, tmp_path: Path) -> None:
    folder, said = tmp_path / "out", list[str]()
    folder.mkdir()
    (folder / "STOP").write_text("a page of mine", encoding="utf-8")
    (folder / "SAVE").mkdir()

    def touch(self: Any, run: sft.Run, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            os.utime(folder / "STOP", ns=(0, 0))

    summary = train("out", (toy(sft_step_ended=touch),), say=said.append, **CONSTANT)
    assert summary.steps == 4
    note = f"note: {folder / 'STOP'} was there before the training began, so it asks nothing; touch it to ask now"
    assert said.count(note) == 1
    assert (folder / "SAVE").is_dir()
    assert checkpoints_of(folder) == []


@pytest.mark.slow
def test_an_order_that_is_given_anew_while_the_first_is_carried_out_stays(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    class Asks(sft.Plugin):
        name = "asks"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                (folder / "SAVE").touch()

        @sft.hookimpl
        def sft_checkpoint_saved(self, run: sft.Run, folder: Path) -> None:
            if run.step == 2:
                (folder.parent / "SAVE").write_text("again", encoding="utf-8")

    train("out", (Asks,), **{**CONSTANT, "max_steps": 5})
    assert checkpoints_of(folder) == ["checkpoint-2", "checkpoint-3"]
    assert not (folder / "SAVE").exists()


# --- several processes --------------------------------------------------------------------------------------


class Together:
    """What processes of a run ask each other, here threads."""

    def __init__(self, count: int) -> None:
        self._values = [0.0] * count
        self._barrier = threading.Barrier(count, timeout=20)
        self.calls = 0

    def largest(self, rank: int, value: float) -> float:
        self._values[rank] = value
        if rank == 0:
            self.calls += 1
        self._barrier.wait()
        found = max(self._values)
        self._barrier.wait()
        return found


def heard(tmp_path: Path, asks: list[Callable[[Control, Stop], None]]) -> tuple[list[Wishes], int]:
    """What each of several processes knows after one call, and how many messages that took."""
    together, known = Together(len(asks)), dict[int, Wishes]()

    def process(rank: int) -> None:
        run: Any = SimpleNamespace(
            strategy=SimpleNamespace(is_main=rank == 0, largest=lambda value: together.largest(rank, value)),
            control=Control(),
            stop=Stop(lambda text: None),
            output_dir=tmp_path,
            dev_data=[1],
            say=lambda text: None,
        )
        known[rank] = Wishes(run)
        asks[rank](run.control, run.stop)
        known[rank].hear()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [known[rank] for rank in range(len(asks))], together.calls


def test_what_one_process_is_asked_all_do(tmp_path: Path) -> None:
    def signalled(control: Control, stop: Stop) -> None:
        stop.asked = 15

    found, _ = heard(
        tmp_path,
        [
            lambda control, stop: control.save(),
            lambda control, stop: (control.stop("enough"), control.stop("later")),  # type: ignore[list-item]
            lambda control, stop: control.evaluate(),
            signalled,
        ],
    )
    assert [(wishes.saves, wishes.evaluates, wishes.signal) for wishes in found] == [(True, True, 15)] * 4
    other = "another process of the run has asked for it"
    assert [wishes.stops for wishes in found] == [other, "enough", other, other]


def test_a_step_in_which_nothing_is_asked_costs_one_message(tmp_path: Path) -> None:
    found, messages = heard(tmp_path, [lambda control, stop: None] * 3)
    assert [(wishes.stops, wishes.saves, wishes.evaluates, wishes.signal) for wishes in found] == [
        (None, False, False, 0)
    ] * 3
    assert messages == 1
