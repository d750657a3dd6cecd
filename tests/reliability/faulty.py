"""A short run that the tests of faults spoil, in this process or by the command, and what must be left of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import sft
from sft.testing import write_data

MODEL = Path(__file__).resolve().parent.parent.parent / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
TRAINING: dict[str, Any] = {
    "model_name_or_path": str(MODEL),
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "do_eval": False,
    "disable_tqdm": True,
    "device": "cpu",
}


def small(folder: Path) -> dict[str, Any]:
    """Settings of a short run, whose data are made in ``folder``."""
    records = [{"src": f"type#{number}", "tgt": "A coat" + " for you" * (number % 5)} for number in range(12)]
    return {**TRAINING, "dataset_name_or_path": str(write_data(folder / "data", records))}


def run(out: Path, settings: dict[str, Any], **more: Any) -> sft.Summary:
    return sft.run({**settings, "output_dir": str(out), **more}, say=lambda text: None)


def contents(folder: Path) -> dict[str, bytes]:
    """All that two equal runs have in common: everything but times and paths."""
    varying = ("metrics.jsonl", "run.json", "sft.log", "state.json", "manifest.json", "report.html", "report.json")
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in varying)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def is_sentence(text: str) -> bool:
    return "\n" not in text and "Traceback" not in text and 20 < len(text) < 1000


def typed(out: Path, settings: dict[str, Any], **more: Any) -> list[str]:
    """``sft run`` with these settings."""
    line = [sys.executable, "-m", "sft", "run"]
    for name, value in {**settings, "output_dir": str(out), **more}.items():
        line += [
            f"--{name}",
            ",".join(value)
            if isinstance(value, list)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value),
        ]
    return line


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
