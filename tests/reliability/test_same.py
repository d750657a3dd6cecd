"""Equivalent ways of the same training draw one curve: by the command line, in float32, on SmolLM2-135M's shapes.

Each way is a run of its own, held against one with batches of four padded rows: loss and gradient norm of each step
differ by 1e-5 on average at most (relative). What computes the same sums in the same order does not differ at all.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.materials import write_model, write_words
from reliability import figures
from sft.files import read_report
from sft.testing import needs, read_metrics

STEPS, LAYERS, VOCABULARY, LENGTH = (50, 2, 8192, 300) if figures.WHOLE else (6, 2, 2048, 150)
"""LENGTH: the tokens of a packed row; each record, with its template, has more than a third of them
and no more than half."""
RECORDS, DRIFT = 32, 1e-5
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600 if figures.WHOLE else 240)]

TRAINED = {"full": {"learning_rate": 1e-4}, "LoRA": {"learning_rate": 1e-3, "plugin": "lora"}}
WAYS: dict[str, dict[str, Any]] = {
    "batch 2 × 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "batch 1 × 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "packed": {"plugin": "zero-padding", "per_device_train_batch_size": 2},
    "recompute": {"recompute": True},
    # fast-cpu's kernels skip what is hidden by themselves, and would compute in the plugin's stead.
    "flashmask": {"plugin": ("flashmask", "no:fast-cpu")},
    "paddle's operations": {"plugin": "no:fast-cpu"},
    "lazy": {"lazy": True},
    "two ranks": {"nproc": 2, "per_device_train_batch_size": 2},
    "resumed": {},
}
SAME_BITS = ("lazy", "resumed")
NEEDS = {
    "packed": "zero-padding",
    "flashmask": "flashmask",
    "paddle's operations": "fast-cpu",
    "two ranks": "parallel-4d",
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    write_model(folder / "model", LAYERS, VOCABULARY)
    sizes = np.random.default_rng(5).integers(LENGTH // 3 - 4, LENGTH // 2 - 16, RECORDS)
    write_words(folder / "data", folder / "model", sizes // 3, sizes - sizes // 3)
    return folder


def run(materials: Path, name: str, *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of `sft run` with ``changes``, and the rest as the run that all are held against."""
    output = materials / name
    if not (output / "run.json").exists():
        settings: dict[str, Any] = {
            "model_name_or_path": materials / "model",
            "dataset_name_or_path": materials / "data",
            "output_dir": output,
            "max_length": LENGTH,
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "logging_steps": 1,
        }
        line = [sys.executable, "-m", "sft", "run"]
        for change in changes:
            names = change.get("plugin", ())
            line += [part for name in ([names] if isinstance(names, str) else names) for part in ("--plugin", name)]
            settings.update({key: value for key, value in change.items() if key != "plugin"})
        line += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_report(output)["precision"]["dtype"] == "float32"
    return read_metrics(output)


@pytest.mark.row("same", "{kind}: {way}")
@pytest.mark.parametrize("kind", ["full", pytest.param("LoRA", marks=pytest.mark.whole)])
@pytest.mark.parametrize("way", [pytest.param(way, marks=needs(NEEDS[way])) if way in NEEDS else way for way in WAYS])
def test_one_curve(materials: Path, way: str, kind: str) -> None:
    half, began = STEPS // 2, time.monotonic()
    whole = run(materials, kind, TRAINED[kind], {"save_strategy": "steps", "save_steps": half})
    more = {"resume_from_checkpoint": materials / kind / f"checkpoint-{half}"} if way == "resumed" else {}
    other = run(materials, f"{kind} {way}", TRAINED[kind], WAYS[way], more)
    assert [line["step"] for line in other] == [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert [line["target_tokens"] for line in other] == [line["target_tokens"] for line in whole]
    drift = {}
    for key in ("loss", "grad_norm"):
        expected, found = (np.asarray([line[key] for line in lines]) for lines in (whole, other))
        drift[key] = float(np.mean(np.abs(found - expected) / np.abs(expected)))
    assert whole[-1]["loss"] < 0.9 * whole[0]["loss"] or not figures.WHOLE  # there is something to drift from
    seconds = time.monotonic() - began
    figures.record(
        "same", f"{kind}: {way}", steps=STEPS, loss_drift=drift["loss"], norm_drift=drift["grad_norm"], seconds=seconds
    )
    assert max(drift.values()) <= (0 if way in SAME_BITS else DRIFT), drift
