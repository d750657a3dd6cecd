"""``do_train false``: a model, or a checkpoint, is measured, and nothing of training is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import LORA, SETTINGS, stop

import sft
from sft.testing import needs

Train = Callable[..., sft.Summary]


def test_dev_data_alone_is_enough(train: Train, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.json").write_bytes((dataset / "dev.json").read_bytes())
    found = train("out", dataset_name_or_path=str(tmp_path / "data"), do_train=False)
    assert found.data.keys() == {"dev"}
    assert found.eval_loss_after == train("whole", do_train=False).eval_loss_after


def test_training_data_is_not_read(train: Train, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.json").write_bytes((dataset / "dev.json").read_bytes())
    (tmp_path / "data" / "train.json").write_text("no JSON")
    said: list[str] = []
    train("out", dataset_name_or_path=str(tmp_path / "data"), do_train=False, lazy=True, say=said.append)
    assert not [line for line in said if line.startswith("train data")]
    assert any("lazy true" in line.lower() and "do_train is false" in line for line in said)


def test_without_dev_data_there_is_nothing_to_measure(train: Train, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"do_train is false, and .*train\.json has no dev data to measure"):
        train("out", dataset_name_or_path=str(dataset / "train.json"), do_train=False)
    assert not (tmp_path / "out").exists()


@needs("lora", "pissa")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugin": ["lora"]}, "with plugins lora, pissa, and this run has lora; measure it with the same plugins"),
        ({"lora_alpha": 4}, r"with lora_alpha None of plugin lora, and this run has 4\.0; measure it with the same"),
    ],
    ids=["plugins", "option"],
)
def test_a_checkpoint_is_measured_as_what_was_trained(
    train: Train, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Read as something else, its tensors fit and mean another model."""
    kind = {**LORA, "plugin": ["lora", "pissa"], "lora_rank": 4}
    settings = {**SETTINGS, **kind, "save_steps": 1}
    stop(train, 2, "trained", **settings)
    checkpoint = str(tmp_path / "trained" / "checkpoint-1")
    with pytest.raises(sft.UsageError, match=message):
        train("out", do_train=False, resume_from_checkpoint=checkpoint, **{**kind, **changes})
    assert not (tmp_path / "out").exists()
    assert train("out", do_train=False, resume_from_checkpoint=checkpoint, **kind).eval_loss_after
