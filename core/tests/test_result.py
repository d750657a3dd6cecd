"""The result of a run: nothing in it that is not finite, whole when it is there, and not lost to a full disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import SETTINGS, StoppedError, checkpoints_of
from toy_plugins import toy

import sft
from sft.files import read_report
from sft.progress import Progress
from sft.training.journal import read_metrics
from sft.training.manifest import damage
from sft.training.steps_file import read_steps

Train = Callable[..., sft.Summary]
OF_A_FAILED_RUN = ["metrics.jsonl", "report.html", "report.json", "rows.json", "run.json", "sft.log", "steps.bin"]


# --- weights that are not finite ----------------------------------------------------------------------------


def ruining(step: int, name: str = "model.layers.1.mlp.up_proj.weight") -> type[sft.Plugin]:
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
        r"no longer finite after step 4 \(model\.layers\.1\.mlp\.up_proj\.weight has values that are NaN or "
        r"infinite\), and none of them has been saved; lower learning_rate \(0\.001\), and resume from .*checkpoint-2\."
    )
    settings = {**SETTINGS, "save_steps": 2, "save_total_limit": 1, "max_steps": 6, "evaluation_strategy": "no"}
    with pytest.raises(sft.SftError, match=message):
        train("out", (ruining(4),), **settings)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", *OF_A_FAILED_RUN]
    assert read_report(out)["status"] == "failed"
    train("out", resume_from_checkpoint="auto", **settings)
    train("whole", **settings)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_they_are_no_result(train: Train, models: Path, tmp_path: Path) -> None:
    """One step with a finite loss and gradient is enough."""
    settings = {"learning_rate": 3e38, "weight_decay": 3.0}
    message = r"lower learning_rate \(3e\+38\), and start again, for there is no checkpoint"
    with pytest.raises(sft.SftError, match=rf"no longer finite after step 1 \(model\..*{message}"):
        train("out", max_steps=1, do_eval=False, model_name_or_path=str(models / "qwen2-untied"), **settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OF_A_FAILED_RUN


def test_a_model_that_is_not_finite_is_named(train: Train, variant: Callable[..., Path], tmp_path: Path) -> None:
    """Before anything is computed with it, or written."""
    from safetensors.numpy import load_file, save_file

    folder = variant("llama-tied-gqa")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(sft.UsageError, match=r"0\.self_attn\.q_proj\.weight has values that are not finite"):
        train("out", model_name_or_path=str(folder))
    assert not (tmp_path / "out").exists()


# --- the last write -----------------------------------------------------------------------------------------


def swapping(model: Path) -> type[sft.Plugin]:
    """A plugin that puts another model where the run's was."""

    def swap(self: Any) -> None:
        model.rename(model.with_name("moved"))
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
            (model / name).write_text("{}")

    return toy("swap", sft_run_started=swap)


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


VARYING = ("run.json", "metrics.jsonl", "sft.log", "report.html", "report.json")


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
    fill = toy("fill", sft_step_ended=lambda self: full_disk(tmp_path))
    with pytest.raises(sft.SftError, match=r"No space left.*nor could it be written .* it is lost, for there is no ch"):
        train("out", (fill,), max_steps=1, do_eval=False, logging_steps=5)
    assert not any(list((tmp_path / name).iterdir()) for name in ("temporary", "here", "home"))


VANISHES: dict[str, Callable[[Path], Any]] = {
    "removed": shutil.rmtree,
    "moved": lambda out: out.rename(out.with_name("away")),
    "emptied": lambda out: (shutil.rmtree(out), out.mkdir()),
    "run.json": lambda out: (out / "run.json").unlink(),
}
"""What becomes of a run's folder while it trains."""


@pytest.mark.parametrize(
    "how", [name if name == "removed" else pytest.param(name, marks=pytest.mark.slow) for name in VANISHES]
)
@pytest.mark.parametrize(
    "ends", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["to the end", "and is stopped"]
)
def test_a_folder_that_vanishes_is_made_anew(
    train: Train, whole: Callable[..., Path], tmp_path: Path, how: str, ends: bool
) -> None:
    """After step 5, with its checkpoint of step 3. It is said once, the folder is locked and known as a run's again,
    and what is learned is what it would have been, also where the run is stopped after step 11 and goes on."""
    out, said, held = tmp_path / "out", [], []

    class Gone(sft.Plugin):
        name = "gone"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] == 5:
                VANISHES[how](out)
            if record["step"] == 10:
                holder, status = sft.holder_of(out), read_report(out)["status"]
                held.append((holder is not None and holder.pid == os.getpid(), status, checkpoints_of(out)))
            if record["step"] == 11 and not ends:
                raise StoppedError

    if ends:
        train("out", (Gone,), say=said.append, **SETTINGS)
    else:
        with pytest.raises(StoppedError):
            train("out", (Gone,), say=said.append, **SETTINGS)
        train("out", say=said.append, resume_from_checkpoint="auto", **SETTINGS)
    (line,) = [line for line in said if "vanished" in line]
    stays = how == "run.json"
    is_there = how in ("emptied", "run.json")
    assert line.startswith(f"note: {'run.json, and perhaps more, has vanished from ' if is_there else ''}{out} ")
    assert line.endswith("and the run goes on there after step 5")
    assert line in (out / "sft.log").read_text()
    assert held == [(True, "running", [f"checkpoint-{step}" for step in (3, 6, 9)[not stays :]])]
    assert read_report(out)["status"] == "finished"
    for name in ("model.safetensors", "checkpoint-12/trainer/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole() / name).read_bytes()
    steps, complete = read_steps(out), read_steps(whole())
    assert steps is not None
    assert complete is not None
    assert len(steps) == 13
    assert list(steps.known) == [stays or step > 5 for step in range(1, 14)]
    assert (steps.loss[5:] == complete.loss[5:]).all()
    lines = [line["step"] for line in read_metrics(out) if "loss" in line]
    assert lines == ([1] if stays else []) + ([4] if stays else []) + [8, 12, 13]
    assert damage(out / "checkpoint-12", Progress(said.append)) is None


@pytest.mark.slow
@pytest.mark.parametrize("what", ["samples", "generations"])
def test_a_folder_that_vanishes_while_the_model_answers(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Which takes minutes where there is much to answer."""
    from sft.training import evaluation

    own, out = evaluation.answer, tmp_path / "out"

    def answer(run: Any, questions: Any) -> list[str]:
        texts = own(run, questions)
        if run.step == 1:
            shutil.rmtree(out)
        return texts

    monkeypatch.setattr(evaluation, "answer", answer)
    asks = {"num_samples": 1} if what == "samples" else {"eval_with_do_generation": True}
    settings = {"max_steps": 2, "evaluation_strategy": "steps", "eval_steps": 1, "max_new_tokens": 2}
    train("out", **settings, **asks)
    for step in (1, 2):
        assert (out / f"{what}-{step}.jsonl").is_file()
    assert (out / "model.safetensors").is_file()


def test_where_it_cannot_be_made_anew_what_was_learned_is_elsewhere(train: Train, tmp_path: Path) -> None:
    """In its place there is a file."""

    def replace(self: Any, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").touch()

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "logging_steps": 10, "do_eval": False}
    with pytest.raises(
        sft.SftError, match=r"cannot go on after step 3 \(File exists: \S+out\); it is in \S+ instead"
    ) as caught:
        train("out", (toy("gone", sft_step_ended=replace),), **settings)
    where = Path(re.search(r"it is in (\S+) instead", str(caught.value))[1])
    assert (where / "model.safetensors").is_file()


@pytest.mark.slow
def test_what_was_learned_since_a_checkpoint_of_another_name_is_elsewhere(train: Train, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "do_eval": False}
    train("first", max_steps=3, **settings)
    (tmp_path / "first" / "checkpoint-3").rename(tmp_path / "good")

    def replace(self: Any, record: dict[str, Any]) -> None:
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").touch()

    settings |= {"max_steps": 5, "resume_from_checkpoint": str(tmp_path / "good"), "save_steps": 9}
    with pytest.raises(sft.SftError, match=r"cannot go on after step 4 \(.*\); it is in \S+ instead"):
        train("out", (toy("gone", sft_step_ended=replace),), **settings)


def test_what_goes_wrong_in_one_of_several_processes_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """A plugin's strategy may be a subclass of SingleProcess: its other processes do not know of the error."""
    from types import SimpleNamespace

    from sft.parallel import SingleProcess
    from sft.training.publish import rescued

    class Shared(SingleProcess):
        def largest(self, value: float) -> float:
            raise AssertionError("it waits for processes that never come")

    training = SimpleNamespace(resume_from_checkpoint=None)
    settings = SimpleNamespace(training=training)
    stop = SimpleNamespace(instead_of=lambda error: error)  # no signal has come
    run: Any = SimpleNamespace(strategy=Shared(), step=3, output_dir=tmp_path, settings=settings, stop=stop)
    optimizer: Any = SimpleNamespace(parameters={})
    error = rescued(run, optimizer, OSError(28, "No space left on device"))
    assert isinstance(error, sft.SftError)
    assert "what it has learned is lost, for there is no checkpoint" in str(error)
