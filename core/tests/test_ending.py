"""How runs end: finished, failed or interrupted; what run.json says of it, and what each plugin hears."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import raising, toy

import sft

Train = Callable[..., sft.Summary]


class CauseError(sft.SftError):
    """What ends a run."""


def listening(heard: list[str], called: str) -> type[sft.Plugin]:
    """A plugin that writes down which end it hears of."""
    return toy(
        called,
        sft_run_ended=lambda self: heard.append(f"{called}: ended"),
        sft_run_failed=lambda self, error: heard.append(f"{called}: {type(error).__name__}"),
    )


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_an_error_in_sft_run_failed_is_said_and_no_more(train: Train, tmp_path: Path) -> None:
    heard: list[str] = []
    said: list[str] = []
    fails = toy("fails", sft_run_failed=raising(ValueError("a bug")))
    bad = toy("bad", sft_step_ended=raising(CauseError("the cause")))
    with pytest.raises(CauseError, match="the cause"):
        train("out", (listening(heard, "a"), fails, bad, listening(heard, "z")), say=said.append)
    assert heard == ["a: CauseError", "z: CauseError"]
    assert said[-1].startswith("note: Plugin fails (")
    assert "failed in sft_run_failed (ValueError: a bug)" in said[-1]
    assert (report(tmp_path / "out")["status"], report(tmp_path / "out")["error"]) == (
        "failed",
        "the cause",
    )


def test_an_error_in_sft_run_ended_comes_when_all_have_been_told(train: Train, tmp_path: Path) -> None:
    """The run has finished: nobody hears that it failed, and run.json stays as it is."""
    heard: list[str] = []
    said: list[str] = []
    first, second = (toy(name, sft_run_ended=raising(CauseError(name))) for name in ("first", "second"))
    plugins = (listening(heard, "a"), first, second, listening(heard, "z"))
    with pytest.raises(CauseError, match="first"):
        train("out", plugins, max_steps=1, say=said.append)
    assert heard == ["a: ended", "z: ended"]
    assert said[-1] == "note: second"
    assert report(tmp_path / "out")["status"] == "finished"
    assert report(tmp_path / "out")["result"]["steps"] == 1


def test_what_a_plugin_does_to_the_summary_is_its_own(train: Train, tmp_path: Path) -> None:
    """Except that another process tells the user."""

    def plugin(number: int) -> type[sft.Plugin]:
        class Vain(sft.Plugin):
            name = f"vain-{number}"
            api_version = 1

            @sft.hookimpl
            def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
                seen.append(summary.as_dict())
                summary.eval_loss_after = -1.0
                summary.data["dev"]["records"] = -1
                summary.speaks = number != 1

        return Vain

    seen: list[dict[str, Any]] = []
    summary = train("out", (plugin(1), plugin(2)), max_steps=1)
    result = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    assert seen == [result, result]
    assert summary.as_dict() == result
    assert not summary.speaks


@pytest.mark.parametrize("leaves", [KeyboardInterrupt(), SystemExit(0)], ids=["Ctrl-C", "exit"])
def test_leaving_in_sft_run_failed_is_said_and_no_more(train: Train, tmp_path: Path, leaves: BaseException) -> None:
    heard: list[str] = []
    said: list[str] = []
    fails = toy("fails", sft_run_failed=raising(leaves))
    bad = toy("bad", sft_step_ended=raising(CauseError("the cause")))
    with pytest.raises(CauseError, match="the cause"):
        train("out", (listening(heard, "a"), fails, bad, listening(heard, "z")), say=said.append)
    assert heard == ["a: CauseError", "z: CauseError"]
    assert said[-1].startswith("note: Plugin fails (")
    assert "in sft_run_failed" in said[-1]
    assert report(tmp_path / "out")["error"] == "the cause"


@pytest.mark.parametrize(
    ("leaves", "comes"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (SystemExit(0), sft.PluginError)],
    ids=["Ctrl-C", "exit"],
)
def test_leaving_in_sft_run_ended_comes_when_all_have_been_told(
    train: Train, tmp_path: Path, leaves: BaseException, comes: type[BaseException]
) -> None:
    heard: list[str] = []
    fails = toy("fails", sft_run_ended=raising(leaves))
    with pytest.raises(comes):
        train("out", (listening(heard, "a"), fails, listening(heard, "z")), max_steps=1)
    assert heard == ["a: ended", "z: ended"]
    assert report(tmp_path / "out")["status"] == "finished"


def test_an_exit_in_a_hook_is_no_end_without_a_word(train: Train, tmp_path: Path) -> None:
    heard: list[str] = []
    exits = toy("exits", sft_step_ended=raising(SystemExit(0)))
    with pytest.raises(sft.PluginError, match=r"^Plugin exits .* failed in sft_step_ended \(SystemExit: 0\); tell its"):
        train("out", (exits, listening(heard, "a")))
    assert heard == ["a: PluginError"]
    assert report(tmp_path / "out")["status"] == "failed"


@pytest.mark.parametrize("fails_in", ["sft_run_ended", "sft_step_ended"])
def test_who_only_starts_a_run_hears_of_its_failure_alone(train: Train, tmp_path: Path, fails_in: str) -> None:
    """Where the run has finished, and something goes wrong then, nobody hears that it failed."""
    heard: list[str] = []
    bad = toy("bad", **{fails_in: raising(CauseError("the cause"))})
    elsewhere = toy("elsewhere", sft_launch=lambda self: train("out", (bad,), max_steps=1))
    with pytest.raises(CauseError, match="the cause"):
        train("out", (elsewhere, listening(heard, "a")), max_steps=1)
    finished = fails_in == "sft_run_ended"
    assert heard == ([] if finished else ["a: CauseError"])
    assert report(tmp_path / "out")["status"] == ("finished" if finished else "failed")


@pytest.mark.parametrize("settings", [{}, {"do_train": False}], ids=["training", "measuring"])
def test_an_interrupted_run_says_so(train: Train, tmp_path: Path, settings: dict[str, Any]) -> None:
    heard: list[str] = []
    stops = toy("stops", sft_evaluated=raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train("out", (stops, listening(heard, "a")), **settings)
    assert heard == ["a: KeyboardInterrupt"]
    assert report(tmp_path / "out")["status"] == "interrupted"
    assert train("out", resume_from_checkpoint="auto", max_steps=1).steps == 1  # it had no checkpoint yet
    assert report(tmp_path / "out")["status"] == "finished"


def test_a_run_that_ends_before_it_writes_leaves_the_folder_alone(train: Train, tmp_path: Path) -> None:
    """What an older run says there stays, whatever it says."""
    bad = toy("bad", sft_collator=raising(CauseError()))
    with pytest.raises(CauseError):
        train("out", (bad,))
    assert not (tmp_path / "out").exists()
    train("out", max_steps=1)
    (tmp_path / "out" / "run.json").write_text('{"status": "running"}')
    with pytest.raises(CauseError):
        train("out", (bad,), overwrite_output_dir=True)
    assert report(tmp_path / "out") == {"status": "running"}


def test_a_refusal_after_sft_check_is_heard(train: Train) -> None:
    """A quantizer without an adapter: whoever opened something when it was checked can close it."""
    heard: list[str] = []
    checked = toy("checked", sft_check=lambda self: heard.append("check"), sft_quantizer=lambda self: None)
    with pytest.raises(sft.UsageError, match="quantizes the base model"):
        train("out", (checked, listening(heard, "a")))
    assert heard == ["check", "a: UsageError"]


INTERRUPT = """
import os, signal, sys
import sft
from sft.commands.cli import main

class Stop(sft.Plugin):
    name = "stop"
    api_version = 1

    @sft.hookimpl
    def {hook}(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job are deaf to it
        os.kill(os.getpid(), signal.SIGINT)
"""


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("hook", "settings", "message"),
    [
        slow("sft_collator", [], "interrupted before anything was written."),
        slow("sft_run_started", [], "auto begins again, for there is no checkpoint yet."),
        ("sft_checkpoint_saved", ["--save_strategy", "steps", "--save_steps", "1"], "auto goes on from checkpoint-1."),
        pytest.param(
            "sft_run_ended", [], "interrupted when the run had finished; its result is in out.", marks=pytest.mark.slow
        ),
    ],
)
def test_ctrl_c_promises_what_is_true(
    distribute: Callable[..., None],
    sft_command: Callable[..., subprocess.CompletedProcess[str]],
    base_model: Path,
    dataset: Path,
    tmp_path: Path,
    hook: str,
    settings: list[str],
    message: str,
) -> None:
    distribute("sft-test-stop", INTERRUPT.format(hook=hook), {"stop": "Stop"})
    line = ["run", "--model_name_or_path", str(base_model), "--dataset_name_or_path", str(dataset), "--plugin", "stop"]
    done = sft_command(
        *line, "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--do_eval", "false", *settings
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].replace(str(tmp_path / "out"), "out").endswith(message)
