"""How runs end: finished, failed or interrupted; what run.json says of it, and what each plugin hears."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import SETTINGS

import sft

Train = Callable[..., sft.Summary]


class CauseError(sft.SftError):
    """What ends a run."""


def plugin(called: str, **hooks: Callable[..., Any]) -> type[sft.Plugin]:
    marked = {hook: sft.hookimpl(function) for hook, function in hooks.items()}
    return type("Toy", (sft.Plugin,), {"name": called, "api_version": 1, **marked})


def raising(error: BaseException) -> Callable[..., Any]:
    def hook(self: Any) -> None:
        raise error

    return hook


def listening(heard: list[str], called: str) -> type[sft.Plugin]:
    """A plugin that writes down which end it hears of."""
    return plugin(
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
    fails = plugin("fails", sft_run_failed=raising(ValueError("a bug")))
    bad = plugin("bad", sft_step_ended=raising(CauseError("the cause")))
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
    first, second = (plugin(name, sft_run_ended=raising(CauseError(name))) for name in ("first", "second"))
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
    fails = plugin("fails", sft_run_failed=raising(leaves))
    bad = plugin("bad", sft_step_ended=raising(CauseError("the cause")))
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
    fails = plugin("fails", sft_run_ended=raising(leaves))
    with pytest.raises(comes):
        train("out", (listening(heard, "a"), fails, listening(heard, "z")), max_steps=1)
    assert heard == ["a: ended", "z: ended"]
    assert report(tmp_path / "out")["status"] == "finished"


def test_an_exit_in_a_hook_is_no_end_without_a_word(train: Train, tmp_path: Path) -> None:
    heard: list[str] = []
    exits = plugin("exits", sft_step_ended=raising(SystemExit(0)))
    with pytest.raises(sft.PluginError, match=r"^Plugin exits .* failed in sft_step_ended \(SystemExit: 0\); tell its"):
        train("out", (exits, listening(heard, "a")))
    assert heard == ["a: PluginError"]
    assert report(tmp_path / "out")["status"] == "failed"


@pytest.mark.parametrize("fails_in", ["sft_run_ended", "sft_step_ended"])
def test_who_only_starts_a_run_hears_of_its_failure_alone(train: Train, tmp_path: Path, fails_in: str) -> None:
    """Where the run has finished, and something goes wrong then, nobody hears that it failed."""
    heard: list[str] = []
    bad = plugin("bad", **{fails_in: raising(CauseError("the cause"))})
    elsewhere = plugin("elsewhere", sft_launch=lambda self: train("out", (bad,), max_steps=1))
    with pytest.raises(CauseError, match="the cause"):
        train("out", (elsewhere, listening(heard, "a")), max_steps=1)
    finished = fails_in == "sft_run_ended"
    assert heard == ([] if finished else ["a: CauseError"])
    assert report(tmp_path / "out")["status"] == ("finished" if finished else "failed")


@pytest.mark.parametrize("settings", [{}, {"do_train": False}], ids=["training", "measuring"])
def test_an_interrupted_run_says_so(train: Train, tmp_path: Path, settings: dict[str, Any]) -> None:
    heard: list[str] = []
    stops = plugin("stops", sft_evaluated=raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train("out", (stops, listening(heard, "a")), **settings)
    assert heard == ["a: KeyboardInterrupt"]
    assert report(tmp_path / "out")["status"] == "interrupted"
    assert train("out", resume_from_checkpoint="auto", max_steps=1).steps == 1  # it had no checkpoint yet
    assert report(tmp_path / "out")["status"] == "finished"


def test_a_run_that_ends_before_it_writes_leaves_the_folder_alone(train: Train, tmp_path: Path) -> None:
    """What an older run says there stays, whatever it says."""
    bad = plugin("bad", sft_collator=raising(CauseError()))
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
    checked = plugin("checked", sft_check=lambda self: heard.append("check"), sft_quantizer=lambda self: None)
    with pytest.raises(sft.UsageError, match="quantizes the base model"):
        train("out", (checked, listening(heard, "a")))
    assert heard == ["check", "a: UsageError"]


INTERRUPT = """
import os, signal, sys
import sft
from sft.commands import main

class Stop(sft.Plugin):
    name = "stop"
    api_version = 1

    @sft.hookimpl
    def {hook}(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job are deaf to it
        os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("hook", "settings", "message"),
    [
        ("sft_collator", [], "interrupted before anything was written."),
        ("sft_run_started", [], "auto begins again, for there is no checkpoint yet."),
        ("sft_checkpoint_saved", ["--save_strategy", "steps", "--save_steps", "1"], "auto goes on from checkpoint-1."),
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
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(message)


# --- weights that are not finite ----------------------------------------------------------------------------


def ruining(step: int, name: str = "llama.layers.1.mlp.up_proj.weight") -> type[sft.Plugin]:
    """A plugin after whose ``step`` one value of a tensor is infinite: what no loss has seen yet."""

    class Ruin(sft.Plugin):
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == step:
                parameter = dict(run.model.named_parameters())[name]
                values = parameter.numpy()
                values[3, 5] = float("inf")
                parameter.set_value(values)

    Ruin.name = "ruin"
    return Ruin


def test_weights_that_are_not_finite_are_not_saved(train: Train, tmp_path: Path) -> None:
    """Nor do they push the last good checkpoint out."""
    out = tmp_path / "out"
    message = (
        r"no longer finite after step 4 \(llama\.layers\.1\.mlp\.up_proj\.weight has values that are NaN or "
        r"infinite\), and none of them has been saved; lower learning_rate \(0\.001\), and resume from .*checkpoint-2\."
    )
    settings = {**SETTINGS, "save_steps": 2, "save_total_limit": 1, "max_steps": 6, "evaluation_strategy": "no"}
    with pytest.raises(sft.SftError, match=message):
        train("out", (ruining(4),), **settings)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "metrics.jsonl", "run.json"]
    assert report(out)["status"] == "failed"
    train("out", resume_from_checkpoint="auto", **settings)
    train("whole", **settings)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e39}, r"lower learning_rate \(1e\+39\), and start again, for there is no checkpoint"),
        ({"adam_epsilon": 1e-300}, r"raise adam_epsilon \(1e-300 is 0 in float32; 1e-8 is usual\) or lower"),
    ],
)
def test_they_are_no_result(train: Train, models: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """One step with a finite loss and gradient is enough. Many rows of an untied embedding have no gradient."""
    named = {"model_name_or_path": str(models / "qwen2-untied")}
    with pytest.raises(sft.SftError, match=rf"no longer finite after step 1 \(qwen2\..*{message}"):
        train("out", max_steps=1, do_eval=False, **named, **settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "run.json"]


def test_a_model_that_is_not_finite_is_named(train: Train, variant: Callable[..., Path], tmp_path: Path) -> None:
    """A lower learning rate would not help, and there is nothing to resume from."""
    from safetensors.numpy import load_file, save_file

    folder = variant("llama-tied-gqa")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for settings in ({"do_eval": False}, {}):
        with pytest.raises(sft.SftError, match=r"is not finite.*q_proj\.weight of .* holds values .*replace the model"):
            train(f"out{len(settings)}", model_name_or_path=str(folder), **settings)


# --- the last write -----------------------------------------------------------------------------------------


def swapping(model: Path) -> type[sft.Plugin]:
    """A plugin that puts another model where the run's was."""

    def swap(self: Any) -> None:
        model.rename(model.with_name("moved"))
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
            (model / name).write_text("{}")

    return plugin("swap", sft_run_started=swap)


@pytest.mark.parametrize("kind", [{}, {"plugin": ["lora"]}], ids=["full", "lora"])
def test_a_result_has_the_tokenizer_that_was_loaded(
    train: Train, variant: Callable[..., Path], tmp_path: Path, kind: dict[str, Any]
) -> None:
    if kind:
        pytest.importorskip("sft_peft_lora")
    folder = variant("llama-tied-gqa")
    train("plain", max_steps=1, model_name_or_path=str(folder), **kind)
    train("out", (swapping(folder),), max_steps=1, model_name_or_path=str(folder), **kind)
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name not in VARYING}
        for name in ("out", "plain")
    )
    assert found == expected
    assert "tokenizer.json" in found


VARYING = ("run.json", "metrics.jsonl")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From the call on, nothing can be written under a folder, as safetensors and Python write."""

    def fill(folder: Path) -> None:
        import safetensors.numpy

        own, own_open = safetensors.numpy.save_file, Path.open

        def refuse(path: Any) -> None:
            if Path(path).is_relative_to(folder):
                raise OSError(28, "No space left on device", str(path))

        def save_file(tensors: Any, path: Any, **more: Any) -> None:
            refuse(path)
            own(tensors, path, **more)

        def open_path(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            if "w" in mode or "a" in mode:
                refuse(path)
            return own_open(path, mode, *more, **named)

        monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
        monkeypatch.setattr(Path, "open", open_path)

    return fill


@pytest.mark.parametrize("when", ["publishing", "checkpoint"])
def test_a_disk_that_is_full_at_the_end_does_not_cost_the_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[Path], None], when: str
) -> None:
    train("whole", max_steps=2)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    out = tmp_path / "out"

    class Fill(sft.Plugin):
        name = "fill"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                full_disk(out)

    saving = {"save_strategy": "steps", "save_steps": 2} if when == "checkpoint" else {}
    with pytest.raises(sft.SftError, match=r"No space left on device: .*it is in .*sft-result-\w+ instead") as caught:
        train("out", (Fill,), max_steps=2, do_eval=False, **saving)
    (place,) = (tmp_path / "temporary").iterdir()
    assert str(place) in str(caught.value)
    for path in place.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in place.iterdir()}
    assert not (out / "model.safetensors").exists()


def test_where_no_place_takes_the_weights_that_is_said(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[Path], None]
) -> None:
    for name in ("temporary", "here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fill = plugin("fill", sft_step_ended=lambda self: full_disk(tmp_path))
    with pytest.raises(sft.SftError, match=r"No space left.*nor could it be written .* it is lost, for there is no ch"):
        train("out", (fill,), max_steps=1, do_eval=False, logging_steps=5)
    assert not any(list((tmp_path / name).iterdir()) for name in ("temporary", "here", "home"))


def test_a_folder_that_has_vanished_is_made_again(train: Train, tmp_path: Path) -> None:
    import shutil

    gone = plugin("gone", sft_step_ended=lambda self: shutil.rmtree(tmp_path / "out"))
    train("out", (gone,), max_steps=1, do_eval=False)
    assert (tmp_path / "out" / "model.safetensors").exists()
