"""What all trackers do: what they log, when, under which names, and that none ends a run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.testing import read_metrics
from sft_track import curves, services
from sft_track.tracker import Tracker, folder_in, numbers_of

Train = Callable[..., sft.Summary]
ALL = (curves.TensorBoard, curves.VisualDL, services.WandB, services.MLflow, services.SwanLab)


class Log(Tracker):
    """Keeps what it is given."""

    name = "log"
    api_version = 1
    library = "json"
    seen: list[Any] = []
    down = False

    def begin(self, run: sft.Run, earlier: str | None, after: int) -> str:
        self.seen.append(("begin", earlier, after))
        if self.down:
            raise ConnectionError("the server is away")
        return "seven"

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.seen.append((step, numbers))

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self.seen.append((status, summary.get("steps")))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> type[Log]:
    monkeypatch.setattr(Log, "seen", [])
    return Log


def test_names_of_numbers() -> None:
    step = {"step": 3, "epoch": 0.5, "loss": 2.0, "tokens": 7, "mine/share": 0.25}
    assert dict(numbers_of(step)) == {"train/epoch": 0.5, "train/loss": 2.0, "train/tokens": 7.0, "mine/share": 0.25}
    sets = {"ads": {"eval_loss": 1.0, "eval_ppl": 2.7}}
    evaluation = {"step": 3, "epoch": 0.5, "eval_loss": 1.5, "eval_sets": sets, "mine/count": 2}
    assert dict(numbers_of(evaluation)) == {
        **{"eval/epoch": 0.5, "eval/loss": 1.5, "eval/ads/loss": 1.0, "eval/ads/ppl": 2.7, "mine/count": 2.0},
    }


def test_each_line_is_logged_and_a_resumed_run_goes_on(train: Train, tmp_path: Path, log: type[Log]) -> None:
    class Fails(sft.Plugin):
        name = "fails"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 4:
                raise sft.SftError("the power went off")

    settings = {"save_strategy": "steps", "save_steps": 2, "evaluation_strategy": "steps", "eval_steps": 2}
    with pytest.raises(sft.SftError, match="the power went off"):
        train("out", (log, Fails), **settings)
    assert [row[0] for row in log.seen] == ["begin", 0, 1, 2, 2, 3, "failed"]
    assert log.seen[0] == ("begin", None, 0)
    log.seen.clear()
    train("out", (log,), resume_from_checkpoint="auto", **settings)
    assert log.seen[0] == ("begin", "seven", 2)
    assert [row[0] for row in log.seen[1:]] == [3, 4, 4, "finished"]
    assert log.seen[-1] == ("finished", 4)
    lines = [line for line in read_metrics(tmp_path / "out") if line["step"] > 2]
    assert [row[1] for row in log.seen[1:-1]] == [dict(numbers_of(line)) for line in lines]


def test_a_server_that_is_away_is_said_and_asked_once(
    train: Train, log: type[Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "down", True)
    said: list[str] = []
    assert train("out", (log,), say=said.append).steps == 4
    assert [line for line in said if "only watches" in line] == [
        "note: Plugin log (given directly as Log) failed in sft_logged (ConnectionError: the server is away); it only "
        "watches, so the run goes on, and this is not said again"
    ]
    assert log.seen == [("begin", None, 0)]


@pytest.mark.slow
def test_measuring_alone_is_logged_too(train: Train, log: type[Log]) -> None:
    train("out", (log,), do_train=False)
    assert [row[0] for row in log.seen] == ["begin", 0, "finished"]


def test_other_processes_log_nothing(log: type[Log]) -> None:
    from types import SimpleNamespace

    plugin, run = log(), SimpleNamespace(strategy=SimpleNamespace(is_main=False))
    plugin.sft_logged(run, {"step": 1, "loss": 1.0})
    plugin.sft_run_ended(run, SimpleNamespace(as_dict=dict))
    assert log.seen == []


def without(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in libraries else real(name, *more)
    )


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("report_to", "wandb"),
        *(
            pytest.param(setting, tracker.name, marks=pytest.mark.slow)
            for setting in ("report_to", "plugin")
            for tracker in ALL
        ),
    ],
)
def test_a_library_that_is_missing_is_refused_with_the_cure(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str, setting: str
) -> None:
    without(monkeypatch, name)
    with pytest.raises(sft.UsageError) as caught:
        train("out", **{setting: [name]})
    cure = f'pip install "sft-track[{name}]"'
    assert str(caught.value) == f"{name} needs {name}, which is not installed; {cure}, or leave it out."


def test_all_means_those_that_are_there(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *(tracker.name for tracker in ALL))
    said: list[str] = []
    assert train("out", say=said.append, report_to="all", max_steps=1, do_eval=False).steps == 1
    notes = [line for line in said if line.startswith("note: report_to all leaves out ")]
    assert len(notes) == len(ALL)
    assert (
        'note: report_to all leaves out wandb, for its library is not installed (pip install "sft-track[wandb]")'
        in (notes)
    )


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("wanb", "report_to: no installed plugin brings wanb (installed: "),
        (["tensorboard", "paper"], "report_to: no installed plugin brings paper (installed: "),
    ],
)
def test_a_word_that_nobody_brings(train: Train, value: Any, cause: str) -> None:
    with pytest.raises(sft.UsageError) as caught:
        train("out", report_to=value)
    assert str(caught.value).startswith(cause)
    if value == "wanb":
        assert str(caught.value).endswith("did you mean wandb?")


def test_one_that_is_asked_for_and_switched_off(train: Train) -> None:
    with pytest.raises(sft.UsageError) as caught:
        train("out", report_to="wandb", plugin=["no:wandb"])
    assert str(caught.value) == "report_to wandb asks for plugin wandb, which is switched off; keep one of them."


@pytest.mark.slow
def test_a_run_has_a_name(train: Train, log: type[Log], monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_track.tracker import name_of

    names: list[str] = []
    monkeypatch.setattr(log, "begin", lambda self, run, earlier, after: names.append(name_of(run)) or "x")
    said: list[str] = []
    train("out", (log,), max_steps=1, do_eval=False, run_name="blue", say=said.append)
    train("plain", (log,), max_steps=1, do_eval=False)
    assert names == ["blue", "plain"]
    assert not any("run_name" in line for line in said)  # it has an effect


def test_a_run_that_replaces_another_has_a_log_of_its_own(tmp_path: Path) -> None:
    first = folder_in(tmp_path, None)
    first.mkdir()
    assert not folder_in(tmp_path, None).exists()
    assert folder_in(tmp_path, first.name) == first


@pytest.mark.slow
def test_no_library_is_imported_before_there_is_something_to_log() -> None:
    code = (
        "import sys, sft_track.curves, sft_track.services; "
        "print([n for n in ('tensorboard', 'visualdl', 'wandb', 'mlflow', 'swanlab') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
