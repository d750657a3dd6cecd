"""Signals that ask a run to end: what it finishes first, what it keeps, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moments import Moments, source
from stopped_runs import SETTINGS, Train, checkpoints_of, contents
from toy_plugins import providing

import sft
from sft.files import read_report
from sft.stopping import SIGNALS, Stop, keep_handlers


def sending(step: int, *numbers: int) -> type[sft.Plugin]:
    """A plugin that lets this process get signals in ``step``, before its last part."""

    class Send(sft.Plugin):
        name = "send"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == step:
                for number in numbers:
                    signal.raise_signal(number)

    return Send


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def test_a_signal_lets_the_step_be_finished_and_saved(train: Train, tmp_path: Path, whole: Callable[..., Path]) -> None:
    said: list[str] = []
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(sft.SignalError) as caught:
        train("out", (sending(7, signal.SIGTERM),), say=said.append, **SETTINGS)
    assert str(caught.value) == "SIGTERM after step 7"
    assert caught.value.exit_code == caught.value.code == 143
    assert "SIGTERM: finishing step 7 and saving; again to stop at once" in said
    assert status(tmp_path / "out") == "interrupted"
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    train("out", resume_from_checkpoint="auto", **SETTINGS)
    found, wanted = contents(tmp_path / "out"), contents(whole())
    assert {name: found[name] for name in wanted} == wanted


def test_a_second_signal_ends_the_run_at_once(train: Train, tmp_path: Path) -> None:
    with pytest.raises(sft.SignalError) as caught:
        train("out", (sending(5, signal.SIGHUP, signal.SIGINT),), **SETTINGS)
    assert (str(caught.value), caught.value.exit_code) == ("SIGINT", 130)
    assert checkpoints_of(tmp_path / "out") == ["checkpoint-3"]
    assert status(tmp_path / "out") == "interrupted"


def test_what_others_make_of_the_end_is_not_the_end(train: Train, tmp_path: Path) -> None:
    """Paddle turns what is raised in a backward pass of Python into an OSError of its own."""

    def turn(run: sft.Run) -> None:
        try:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise OSError("External") from error

    with pytest.raises(sft.SignalError, match="SIGTERM"):
        train("out", (providing("sft_step_ended", turn),), **SETTINGS)
    assert status(tmp_path / "out") == "interrupted"


def test_without_checkpoints_it_says_that_nothing_is_kept(train: Train, tmp_path: Path) -> None:
    """Before the run ends, however long the line takes."""
    said: list[str] = []

    def say(text: str) -> None:
        time.sleep(0.5 if text.startswith("SIGHUP") else 0)
        said.append(text)

    with pytest.raises(sft.SignalError, match="SIGHUP after step 2"):
        train("out", (sending(2, signal.SIGHUP),), say=say, max_steps=4)
    assert any(line.startswith("SIGHUP: finishing step 2; save_strategy is no, so what") for line in said)
    assert checkpoints_of(tmp_path / "out") == []


def test_a_result_is_written_first(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the last step, or later while the result is written; what would come after it does not."""
    from sft.training import publish

    own = publish.publish_result
    monkeypatch.setattr(
        publish, "publish_result", lambda *arguments: (signal.raise_signal(signal.SIGINT), own(*arguments))
    )
    with pytest.raises(sft.SignalError, match="SIGINT after the result was written"):
        train("out", max_steps=2)
    assert (tmp_path / "out" / "config.json").is_file()
    assert status(tmp_path / "out") == "interrupted"


def test_other_parts_end_at_once(train: Train, tmp_path: Path) -> None:
    send = providing("sft_collator", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(sft.SignalError, match="SIGTERM"):
        train("out", (send,), max_steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "call", "which", "says"),
    [
        ("replaced", "replace", 0, "interrupted"),
        ("__init__", "pwrite", 0, "nothing"),
        ("replaced", "replace", -1, "finished"),
    ],
    ids=["run.json is there for the first time", "the folder is locked", "run.json says finished"],
)
def test_no_moment_lies_between_what_is_written_and_its_end(
    train: Train, tmp_path: Path, function: str, call: str, which: int, says: str
) -> None:
    """tests/reliability/test_signal_moments.py tries all moments."""
    moments = Moments("open_run_folder", *map(source, ("training/run_folder", "folder_lock", "files")))
    with moments.counted():
        train("other", do_train=False)
    found = [at for at, text in enumerate(moments.at) if text.startswith(function) and text.endswith(f"after {call}")]
    with (
        moments.counted(found[which], lambda: signal.raise_signal(signal.SIGTERM)),
        pytest.raises(sft.SignalError, match="SIGTERM"),
    ):
        train("out", do_train=False)
    assert not (tmp_path / "out" / "run.lock").exists()
    assert read_report(tmp_path / "out").get("status", "nothing") == says


def test_a_second_signal_finds_run_json_closed(train: Train, tmp_path: Path) -> None:
    """Even one that comes on the way from the first to the end, where nothing can catch it."""
    moments = Moments("fail", source("training/ending"))
    with (
        moments.counted(0, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(sft.SignalError, match="SIGINT"),
    ):
        train("out", (sending(1, signal.SIGTERM),), max_steps=2, do_eval=False)
    assert moments.at[0].startswith("fail:")
    assert status(tmp_path / "out") == "interrupted"


def test_what_the_caller_decided_about_signals_stays() -> None:
    heard: list[int] = []
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: heard.append(1))]
    try:
        with Stop(print).heard():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_another_thread_hears_no_signals() -> None:
    found: list[Any] = []

    def work() -> None:
        with Stop(print).heard():
            found.extend(signal.getsignal(number) for number in SIGNALS)
        keep_handlers(lambda: found.append("kept"))

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [*before, "kept"]


def test_a_library_keeps_no_signal_to_itself() -> None:
    heard: list[str] = []

    def library() -> None:
        signal.signal(signal.SIGTERM, lambda *_: heard.append("library"))
        # To this thread, where it waits: a signal to the process goes to a thread that takes it, if there is another.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        assert heard == []

    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("own"))
    try:
        keep_handlers(library)
        assert heard == ["own"]
    finally:
        signal.signal(signal.SIGTERM, before)
