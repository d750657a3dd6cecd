"""Steps of a run computed again (``sft replay``): the same to the last bit, with their records; and what is said where
something is not as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import again, differing, edited, state_of
from stopped_runs import KINDS, LORA, SETTINGS, checkpoints_of, stop

import sft
from sft.data.tokenizer import Tokenizer
from sft.replay.blame import blame
from sft.replay.opened import OpenedRun
from sft.testing import forward, load, needs
from sft.training.steps_file import NAME, SIZE, read_steps

Train = Callable[..., sft.Summary]
Metrics = Callable[..., list[dict[str, Any]]]
ALL = range(1, 14)
"""The steps of SETTINGS."""


@pytest.fixture
def copied(whole: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the run of SETTINGS, to be changed."""
    return shutil.copytree(whole(), tmp_path / "out")


# --- the same -----------------------------------------------------------------------------------------------


def test_a_step_again_is_the_step_with_its_records(
    whole: Callable[..., Path], base_model: Path, dataset: Path, metrics: Metrics
) -> None:
    """The first one from the beginning, where the model is the base model: its losses are those of a forward pass. The
    seventh one from the checkpoint of step 6."""
    folder = whole()
    before = state_of(folder)
    found = again(folder, 7, 1)
    assert state_of(folder) == before
    assert (found.differences, found.computed, found.starts) == ([], 2, [0, 6])
    assert [(one.step, one.is_same) for one in found.steps] == [(1, True), (7, True)]
    logged = {line["step"]: line for line in metrics(folder) if "loss" in line}
    assert (found.steps[0].loss, found.steps[0].grad_norm) == (logged[1]["loss"], logged[1]["grad_norm"])

    lines = (dataset / "train.json").read_text(encoding="utf-8").splitlines()
    model, tokenizer = load(base_model), Tokenizer(base_model)
    for step in found.steps:
        assert abs(step.mean_loss - step.loss) <= 2e-7 * step.loss
        assert len({record.place for record in step.records}) == len(step.rows) == 4
        for record, row in zip(step.records, step.rows, strict=True):
            number = int(re.fullmatch(rf"{re.escape(str(dataset))}/train.json, line (\d+)", record.place)[1])
            learned = row.labels[row.labels != -100]
            assert tokenizer.decode(learned).startswith(json.loads(lines[number - 1])["tgt"])
            assert (record.targets, record.tokens) == (len(learned), row.tokens)
            if step.step == 1:
                logits = forward(model, row.input_ids[None, : row.tokens])[0].astype(np.float64)
                shifted = logits - logits.max(-1, keepdims=True)
                losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(row.tokens), row.labels[: row.tokens]]
                is_target = row.labels[: row.tokens] != -100
                np.testing.assert_allclose(row.losses[: row.tokens][is_target], losses[is_target], rtol=2e-5)
                np.testing.assert_allclose(record.loss, losses[is_target].mean(), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saves", ["steps", "no"], ids=["from checkpoints", "from the beginning"])
def test_all_steps_of_a_run_that_was_stopped_and_resumed(
    train: Train, tmp_path: Path, kind: dict[str, Any], saves: str
) -> None:
    settings = {**SETTINGS, **kind}
    stop(train, 5, **settings)
    train("out", resume_from_checkpoint="auto", **settings)
    if saves == "no":
        for name in checkpoints_of(tmp_path / "out"):
            shutil.rmtree(tmp_path / "out" / name)
    assert differing(tmp_path / "out") == ([], 13)


@pytest.mark.slow
def test_figures_are_those_that_plugins_are_told_in_each_step(train: Train, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []

    class Listen(sft.Plugin):
        name = "listen"
        api_version = 1
        observes = True

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            told.append((record["loss"], record["grad_norm"]))

    train("out", (Listen,), **SETTINGS)
    figures = read_steps(tmp_path / "out")
    assert figures is not None
    assert list(zip(figures.loss.tolist(), figures.grad_norm.tolist(), strict=True)) == told
    assert len(told) == 13


VARIANTS = {
    "lazy": {"lazy": True},
    "decay in groups, no clipping": {"max_grad_norm": 0.0, "weight_decay": 0.3},
    "best model at the end": {"load_best_model_at_end": True, "eval_steps": 3},
    "answers": {"num_samples": 1, "max_new_tokens": 4},
    "dev split": {"dev_split": 4.0},
    "split records": {"truncation": "split", "max_length": 24},
    "recomputed": {"recompute": True},
    "deterministic": {"deterministic": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_the_run_does(train: Train, tmp_path: Path, dataset: Path, variant: str) -> None:
    given = dict(VARIANTS[variant])
    if "dev_split" in given:
        shutil.copy(dataset / "train.json", tmp_path / "alone.json")
        given["dataset_name_or_path"] = str(tmp_path / "alone.json")
    train("out", **{**SETTINGS, **given})
    assert differing(tmp_path / "out", [1, 4, 5, 13]) == ([], 4)


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_records_of_several_data_sets_are_found_in_their_files(
    train: Train, tmp_path: Path, dataset: Path, lazy: bool
) -> None:
    lines = (dataset / "train.json").read_text(encoding="utf-8").splitlines()
    for name, some in (("a", lines[:10]), ("b", lines[10:25])):
        (tmp_path / f"{name}.json").write_text("\n".join(some), encoding="utf-8")
    sets = f"{tmp_path / 'a.json'}:0.7,{tmp_path / 'b.json'}:0.3"
    train(
        "out",
        **{**SETTINGS, "dataset_name_or_path": sets, "lazy": lazy, "evaluation_strategy": "no", "eval_steps": None},
    )
    found = again(tmp_path / "out", 2, 9)
    assert [one.is_same for one in found.steps] == [True, True]
    tokenizer = Tokenizer(
        Path(json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["model_name_or_path"])
    )
    for step in found.steps:
        for record in step.records:
            path, line = re.fullmatch(r"(.+), line (\d+)", record.place).groups()
            row = step.rows[record.span.row]
            text = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1])["tgt"]
            assert tokenizer.decode(row.labels[row.labels != -100]).startswith(text)


@pytest.mark.slow
def test_a_run_that_went_on_from_another_folder(train: Train, whole: Callable[..., Path], tmp_path: Path) -> None:
    train("out", resume_from_checkpoint=str(whole() / "checkpoint-6"), **SETTINGS)
    assert checkpoints_of(tmp_path / "out")[0] == "checkpoint-9"
    found = again(tmp_path / "out", 3, 7)
    assert (found.starts, [one.is_same for one in found.steps]) == ([0, 6], [True, True])


PLUGIN = """
import sft

class Drift(sft.Plugin):
    name = "drift"
    api_version = ">=1.1,<2"
    shaping = True
    count = 0

    @sft.hookimpl
    def sft_micro_batch(self, run, batch):
        self.count += 1
        head = run.model.lm_head.weight
        head.set_value(head * (1 + 1e-3 * self.count))

    @sft.hookimpl
    def sft_state(self, run):
        return {"count": self.count}

    @sft.hookimpl
    def sft_restore(self, run, state, why, step):
        self.count = state["count"]
"""


@pytest.mark.slow
def test_the_state_of_a_plugin_comes_back_and_a_changed_file_is_named(train: Train, tmp_path: Path) -> None:
    """This one changes the model by how many batches it has seen, so a count that is lost changes the loss."""
    path = tmp_path / "drift.py"
    path.write_text(PLUGIN)
    train("out", plugin=[str(path)], **SETTINGS)
    assert differing(tmp_path / "out", [2, 5, 13]) == ([], 3)
    path.write_text(PLUGIN.replace("1e-3", "2e-3"))
    found = again(tmp_path / "out", 5)
    assert [one.is_same for one in found.steps] == [False]
    assert [clause for clause in found.differences if clause.startswith("plugin files: drift ")]
    path.unlink()
    with pytest.raises(sft.UsageError, match=r"drift\.py"):
        again(tmp_path / "out", 5)


@pytest.mark.slow
def test_settings_that_changed_on_the_way_are_those_of_the_step(train: Train, tmp_path: Path) -> None:
    """Steps 4 and 5 were made at one learning rate and then, from step 3 on, at another; 6 has a checkpoint of the
    first. Each step is computed with its own."""
    settings = {**SETTINGS, "max_steps": 9}
    stop(train, 8, **settings)
    changed = {**settings, "learning_rate": 5e-3, "max_steps": 13}
    said: list[str] = []
    train("out", say=said.append, resume_from_checkpoint="auto", **changed)
    assert any("learning_rate was 0.001 in checkpoint-6" in line for line in said)
    assert differing(tmp_path / "out") == ([], 13)

    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    found = again(tmp_path / "out", 6, 7)
    assert [one.is_same for one in found.steps] == [True, False]
    (clause,) = found.differences
    assert clause == "settings: the run went on from step 6 with others than before, and that checkpoint is gone"


@pytest.mark.slow
@pytest.mark.parametrize("skips", [False, True])
def test_the_step_that_was_not_finite(train: Train, tmp_path: Path, skips: bool) -> None:
    """With which a run ends, or which it leaves out: it can be looked at all the same."""
    path = tmp_path / "breaking.py"
    path.write_text(
        "import sft\n\n\nclass Breaking(sft.Plugin):\n    name = 'breaking'\n    api_version = '>=1.1,<2'\n\n"
        "    @sft.hookimpl\n    def sft_token_loss(self, run):\n        return Loss(run)\n\n\n"
        "class Loss:\n    def __init__(self, run):\n        self.run = run\n\n"
        "    def loss(self, targets, before):\n        return before / (0.0 if self.run.step == 6 else 1.0)\n"
    )
    settings = {**SETTINGS, "plugin": [str(path)], "evaluation_strategy": "no", "eval_steps": None}
    if skips:
        settings |= {"skip_nan_grad": True, "max_skipped_in_a_row": 2}
    with pytest.raises(sft.SftError, match="in a row" if skips else "no longer finite at step 7"):
        train("out", **settings)
    figures = read_steps(tmp_path / "out")
    assert figures is not None
    assert figures.taken.tolist() == [*[True] * 6, *[False] * (1 + skips)]
    said: list[str] = []
    found = again(tmp_path / "out", 7, said=said)
    assert not any("evaluate them before use" in line for line in said)  # it trains no weights for anybody
    assert [(one.skipped, one.is_same) for one in found.steps] == [(True, True)]
    assert found.minimises == ["breaking"]
    assert len(found.steps[0].records) == 4
    json.dumps(found.as_dict(), allow_nan=False)


# --- not the same -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_differs_is_named(copied: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    edited(
        copied,
        arithmetic={**record["arithmetic"], "threads": 99, "cpu": "Another"},
        packages={**record["packages"], "numpy": "0.9"},
    )
    found = again(copied, 13)
    assert len(found.differences) == 2
    for text in ("threads 99 (now ", "cpu Another (now "):
        assert text in found.differences[0]
    assert re.fullmatch(r"packages: numpy 0\.9 \(now [0-9.]+\)", found.differences[1])


@pytest.mark.slow
def test_data_that_have_changed_are_named(train: Train, dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    train("out", dataset_name_or_path=str(data), **SETTINGS)
    path = data / "train.json"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(['{"src": "type#coat", "tgt": "Another one."}', *lines[1:]]), encoding="utf-8")
    found = again(tmp_path / "out", 2, 8)
    assert found.differences == [f"data: {path}, changed since, so these are not the records of the run's step"]


@pytest.mark.slow
def test_data_that_have_moved(train: Train, dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    train("out", dataset_name_or_path=str(data), **SETTINGS)
    data.rename(tmp_path / "moved")
    with pytest.raises(sft.UsageError, match=rf"{data}, which is not there .* --dataset_name_or_path"):
        again(tmp_path / "out", 8)
    found = again(tmp_path / "out", 8, dataset_name_or_path=str(tmp_path / "moved"))
    assert ([one.is_same for one in found.steps], found.differences) == ([True], [])
    assert str(tmp_path / "moved") in found.steps[0].records[0].place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step"), [({}, 2), pytest.param(LORA, 2, marks=needs("lora")), pytest.param(LORA, 8, marks=needs("lora"))]
)
def test_another_base_model_is_refused(
    train: Train, variant: Callable[..., Path], models: Path, tmp_path: Path, kind: dict[str, Any], step: int
) -> None:
    """Where the whole model trains, a checkpoint has all of it, and the base does not matter."""
    base = variant("llama-tied-gqa")
    train("out", model_name_or_path=str(base), **{**SETTINGS, **kind})
    from safetensors.numpy import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(sft.UsageError, match="other weights than those"):
        again(tmp_path / "out", step)
    found = again(tmp_path / "out", step, model_name_or_path=str(models / "llama-tied-gqa"))
    assert [one.is_same for one in found.steps] == [True]
    if not kind:
        assert [one.is_same for one in again(tmp_path / "out", 8).steps] == [True]


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "why"), [(0, "1 to 13, and step 0"), (14, "1 to 13, and step 14"), (-3, "step -3")])
def test_a_step_that_the_run_has_not_computed(whole: Callable[..., Path], step: int, why: str) -> None:
    with pytest.raises(sft.UsageError, match=why):
        again(whole(), step)


@pytest.mark.parametrize("left", [16 + 9 * SIZE, 16 + 9 * SIZE + 5, 16, 0])
@pytest.mark.parametrize(
    "ends",
    ["finished", *(pytest.param(end, marks=pytest.mark.slow) for end in ("killed", "killed without a checkpoint"))],
)
def test_a_file_of_figures_that_was_cut_off_is_what_is_blamed(copied: Path, left: int, ends: str) -> None:
    """And not the step, which the run has computed, as run.json says, or a checkpoint, or its metrics."""
    os.truncate(copied / NAME, left)
    record = json.loads((copied / "run.json").read_text())
    last = 13
    if ends != "finished":
        del record["result"]
        (copied / "run.json").write_text(json.dumps({**record, "status": "running"}))
        last = 13 if "without" in ends else 12
        for path in copied.glob("checkpoint-*") if "without" in ends else [copied / "metrics.jsonl"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    has = max(0, left - 16) // SIZE
    cut = (
        rf"steps\.bin has been cut off at byte {left:,}: the run has computed {last} steps, .* of the first {has} only"
    )
    with pytest.raises(sft.UsageError, match=rf"{cut}, step 12 not among them; put the file back"):
        again(copied, 12)
    if not has:
        with pytest.raises(sft.UsageError, match=rf"{cut}; name a step yourself"):
            blame(OpenedRun.of(copied), 3, print)
    with pytest.raises(sft.UsageError, match=rf"has computed steps 1 to {has}, |so far, and step 0"):
        again(copied, 0)


def test_a_file_that_has_grown_since_it_was_read_was_not_cut_off(copied: Path) -> None:
    """The run is under way, and its checkpoints and metrics are looked at a moment later."""
    content = (copied / NAME).read_bytes()
    os.truncate(copied / NAME, 16 + 9 * SIZE)
    opened = OpenedRun.of(copied)
    (copied / NAME).write_bytes(content)
    assert opened.cut is None


@pytest.mark.slow
def test_a_blame_by_figures_that_were_cut_off_says_so(copied: Path) -> None:
    os.truncate(copied / NAME, 16 + 9 * SIZE)
    said: list[str] = []
    blame(OpenedRun.of(copied), 1, said.append)
    (line,) = [line for line in said if "cut off" in line]
    assert line.endswith("has the figures of the first 9 only, so later spikes are not found")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    for folder, why in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(sft.UsageError, match=why):
            again(folder, 1)


@pytest.mark.slow
def test_a_run_that_goes_on(stopped: Path) -> None:
    """It has come to step 5, and nobody knows whether it still runs."""
    edited(stopped, status="running")
    with pytest.raises(sft.UsageError, match="has computed steps 1 to 5 so far, and step 6 is none of them"):
        again(stopped, 6)


@pytest.mark.slow
def test_a_run_of_an_earlier_version(copied: Path) -> None:
    """Without the figures of its steps, and without what run.json says of it only since then."""
    (copied / NAME).unlink()
    edited(copied, given=None, schedule=None, base_fingerprint=None, date=None)
    found = again(copied, 2, 13)
    assert [one.is_same for one in found.steps] == [None, None]
    assert found.differences == []
    with pytest.raises(sft.UsageError, match="ends at step 13, and step 14 is beyond it"):
        again(copied, 14)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(copied: Path) -> None:
    said: list[str] = []
    for number in (3, 6):
        path = copied / f"checkpoint-{number}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    found = again(copied, 8, said=said)
    assert (found.starts, [one.is_same for one in found.steps], found.computed) == ([0], [True], 8)
    notes = [line for line in said if "is damaged" in line]
    assert [f"checkpoint-{number}" in note for number, note in zip((6, 3), notes, strict=True)] == [True, True]


@pytest.mark.slow
def test_a_run_with_a_class_that_nobody_finds(train: Train, tmp_path: Path) -> None:
    class Own(sft.Plugin):
        name = "own"
        api_version = 1

    train("out", (Own,), **{**SETTINGS, "max_steps": 2})
    with pytest.raises(sft.UsageError, match=r"plugin own, a class that a Python program gave to sft\.run"):
        again(tmp_path / "out", 1)


@pytest.mark.slow
def test_a_run_that_only_measured(train: Train, tmp_path: Path) -> None:
    train("out", do_train=False)
    with pytest.raises(sft.UsageError, match="only measured"):
        again(tmp_path / "out", 1)
