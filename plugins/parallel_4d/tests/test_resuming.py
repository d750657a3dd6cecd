"""A run that was killed under one plan goes on under another: model and optimizer, as one process would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import run_ranks
from resuming import SAVES, checked
from safetensors.numpy import load_file
from trainings import PLANS, ROWS, Trainings, assert_equal

import sft
from sft.testing import needs
from sft.training.manifest import write_manifest

OLD = Path(__file__).parent / "fixtures" / "before_buckets"
CHANGES = [
    ("pp2", "one"),
    ("stage3", "pp2"),
    pytest.param("pp2-virtual", "pp2", marks=pytest.mark.slow),
    pytest.param("pp2", "pp2-virtual", marks=pytest.mark.slow),
    pytest.param("pp2-virtual-dp2", "tp2-stage1", marks=pytest.mark.slow),
    pytest.param("tp2-stage1", "tp2-stage1", marks=pytest.mark.slow),
    pytest.param("tp2", "dp2", marks=pytest.mark.slow),
    pytest.param("one", "stage2", marks=pytest.mark.slow),
    pytest.param("stage1", "tp2-sequence", marks=pytest.mark.slow),
    pytest.param("tp2-pp2", "stage3", marks=pytest.mark.slow),
    pytest.param("dp2-stage1", "tp2-pp2", marks=pytest.mark.slow),
    pytest.param("cp2", "one", marks=pytest.mark.slow),
    pytest.param("one", "cp4", marks=pytest.mark.slow),
    pytest.param("cp2-stage3", "cp2-tp2", marks=pytest.mark.slow),
    pytest.param("tp2-stage1", "cp2-dp2-stage1", marks=pytest.mark.slow),
    pytest.param("tp2-stage3", "dp2", marks=pytest.mark.slow),
    pytest.param("stage2", "tp2-stage3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_killed_run_goes_on_under_another_plan(trainings: Trainings, old: str, new: str) -> None:
    checked(trainings, old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tp2", "dp2", marks=pytest.mark.slow),
        ("pp2", "one"),
        pytest.param("tp2-pp2", "stage3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(["lora", "pissa"], marks=needs("lora", "pissa")),
        pytest.param(["vera"], marks=[needs("vera"), pytest.mark.slow]),
    ],
)
def test_an_adapter_goes_on_under_another_plan(trainings: Trainings, old: str, new: str, plugins: list[str]) -> None:
    checked(trainings, old, new, plugin=plugins)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp2", "stage2"])
def test_a_run_from_before_fleets_buckets_goes_on(tmp_path: Path, plan: str) -> None:
    """``fixtures/before_buckets/make.py`` says what the files are; its two ranks held other pieces than ours do."""
    settings = json.loads((OLD / "settings.json").read_text(encoding="utf-8"))
    settings |= {"model_name_or_path": str(OLD / "model"), "dataset_name_or_path": str(OLD / "data")}
    begun = shutil.copytree(OLD / "run", tmp_path / "begun")
    for name, folder, more in (
        ("one", tmp_path / "one", {}),
        (plan, begun, {"resume_from_checkpoint": "auto"}),
    ):
        rows = settings["per_device_train_batch_size"] * PLANS[name].data
        run = {**settings, **PLANS[name].settings, "gradient_accumulation_steps": ROWS // rows, **more}
        run_ranks(PLANS[name].processes, "jobs:train", {**run, "output_dir": str(folder)}, timeout=60)
    assert_equal(tmp_path / "one", begun)
    lines = [(folder / "metrics.jsonl").read_text(encoding="utf-8") for folder in (OLD / "run", begun)]
    assert lines[1].startswith(lines[0]), "It has begun anew."


def test_a_checkpoint_holds_each_value_once(trainings: Trainings) -> None:
    """Each rank writes its own pieces, which together are the state that one process has; weights are whole."""
    one = trainings.one(**SAVES)
    output, _ = trainings.many(PLANS["tp2-stage1"], **SAVES)
    trainer, alone = output / "checkpoint-4" / "trainer", one / "checkpoint-4" / "trainer"
    files = sorted(trainer.glob("optimizer-*.safetensors"))
    assert len(files) == 4
    held = [sum(array.nbytes for array in load_file(path).values()) for path in files]
    state = load_file(alone / "optimizer.safetensors")
    scalars = sum(array.nbytes for array in state.values() if array.size == 1)
    whole = sum(array.nbytes for array in state.values()) - scalars
    assert whole <= sum(held) <= whole + 4 * scalars
    assert max(held) < 0.3 * whole + scalars  # a quarter, but for norms, which tensor ranks do not divide
    names = [set(load_file(folder.parent / "model.safetensors")) for folder in (trainer, alone)]
    assert names[0] == names[1]


def test_a_missing_piece_is_named(trainings: Trainings) -> None:
    output, _ = trainings.many(PLANS["stage1"], **SAVES)
    (output / "checkpoint-4" / "trainer" / "optimizer-00001.safetensors").unlink()
    settings = json.loads((output / "run.json").read_text())["settings"]
    values = {key: value for key, value in settings.items() if value is not None and key not in ("plugin", "sharding")}
    values = {key: value for key, value in values.items() if not key.endswith(("_degree", "_parallel", "_timeout"))}
    source = str(output / "checkpoint-4")
    values.update(gradient_accumulation_steps=ROWS // 2, max_steps=6, resume_from_checkpoint=source, nproc=1)
    for message in (
        r"trainer/optimizer-00001\.safetensors is missing",
        r"lacks pieces of .*a process's file is missing",
    ):
        with pytest.raises(sft.UsageError, match=message):
            sft.run(values, say=lambda text: None)
        write_manifest(Path(source))  # as one of its processes might have left it
