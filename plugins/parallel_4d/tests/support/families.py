"""Runs of the models in the core's fixtures, of every family that the decoder computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks
from trainings import ALL, Trainings

from sft.testing import needs

FOLDER = Path(__file__).parents[4] / "core" / "tests" / "fixtures" / "families"
WITH_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
DENSE = tuple(case for case in CASES if case not in WITH_EXPERTS)
FIXED = {"max_steps": 2, "per_device_train_batch_size": 4, "evaluation_strategy": "no"}
SETTINGS: dict[str, dict[str, Any]] = {"full": FIXED, "lora": {**FIXED, "plugin": ["lora"], "lora_rank": 4}}
SETTINGS["dora"] = {**SETTINGS["lora"], "plugin": ["lora", "dora"]}


def folders(
    trainings: Trainings, tokenizer: Path, plan: str, cases: tuple[str, ...], settings: dict[str, Any]
) -> list[Path]:
    """Where runs of ``cases`` under ``plan`` have written, one after the other in the same processes."""
    runs = []
    for case in cases:
        positions = json.loads((FOLDER / case / "config.json").read_text())["max_position_embeddings"]
        lengths = {"max_length": min(60, positions + 1), "src_length": min(40, positions // 2)}
        model = {"model_name_or_path": str(FOLDER / case), "tokenizer_name_or_path": str(tokenizer)}
        runs.append(trainings.settings(ALL[plan], **model, **lengths, **settings))
    run_ranks(ALL[plan].processes, "jobs:train_each", runs, timeout=100)
    return [Path(run["output_dir"]) for run in runs]


def case(plan: str, what: str, cases: tuple[str, ...], slow: bool = False) -> Any:
    marks = [needs(*SETTINGS[what].get("plugin", [])), *([pytest.mark.slow] if slow else [])]
    return pytest.param(plan, what, cases, marks=marks, id=f"{plan}-{what}-{len(cases)}")
