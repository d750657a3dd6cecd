"""Recomputing activations: the same run to the last bit, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.testing import needs

DEMO = Path(__file__).parents[1] / "src" / "sft" / "demo"


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "dropout": {"plugin": ["lora"], "lora_dropout": 0.3},
    "everything": {"plugin": ["lora", "nf4", "neftune", "flashmask", "greedy-zero-padding"], "max_length": 96},
    "packed": {"plugin": ["vera", "zero-padding"], "max_length": 96},
}


@pytest.mark.parametrize(
    "settings", [pytest.param(case, id=name, marks=needs(*case.get("plugin", []))) for name, case in CASES.items()]
)
def test_a_recomputed_run_is_the_same(
    train: Callable[..., Any], metrics: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    same = {"max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **settings}
    train("kept", **same)
    train("recomputed", recompute=True, **same)
    assert metrics(tmp_path / "recomputed", same=True) == metrics(tmp_path / "kept", same=True)


def test_layers_are_run_twice(train: Callable[..., Any]) -> None:
    """Forward, and again in backward; evaluation keeps nothing in any case."""
    import sft

    calls: list[bool] = []

    class Count(sft.Plugin):
        name = "count"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            run.model.model.layers[1].mlp.register_forward_pre_hook(lambda layer, inputs: calls.append(layer.training))

    for recompute, expected in ((False, 2), (True, 4)):
        calls.clear()
        train(f"{recompute}", (Count,), max_steps=2, do_eval=False, recompute=recompute)
        assert calls == [True] * expected


@pytest.mark.slow
def test_less_memory(tmp_path: Path) -> None:
    """Six layers and 16 rows of 512 tokens: what a layer keeps for backward is most of the memory of a step."""
    data = tmp_path / "train.json"
    record = {"src": "a dress " * 40, "tgt": "warm and blue " * 400}
    data.write_text("\n".join([json.dumps(record)] * 16))
    peaks = {}
    for recompute in (False, True):
        line = [sys.executable, "-c", "from sft.commands.cli import main; main()", "run"]
        values = {
            "model_name_or_path": DEMO / "model",
            "dataset_name_or_path": data,
            "output_dir": tmp_path / str(recompute),
            "max_length": 512,
            "src_length": 64,
            "per_device_train_batch_size": 16,
            "max_steps": 1,
            "recompute": recompute,
        }
        for name, value in values.items():
            line += [f"--{name}", str(value)]
        subprocess.run(line, check=True, capture_output=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result = json.loads((tmp_path / str(recompute) / "run.json").read_text())["result"]
        peaks[recompute] = result["peak_memory_mib"]
    assert peaks[True] < peaks[False] - 150, peaks
