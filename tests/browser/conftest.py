"""The browser, and pages of real runs for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.driver import Browser, missing

import sft

DEMO = Path(sft.__file__).parent / "demo"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two runs of the demo's model on its data, which differ in their rate and rank."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, changes in (("steady", {}), ("faster", {"learning_rate": 1e-2, "lora_rank": 4})):
        settings: dict[str, Any] = {
            "plugin": ["lora", "greedy-zero-padding"],
            "model_name_or_path": str(DEMO / "model"),
            "dataset_name_or_path": str(DEMO / "data"),
            "output_dir": str(folder / name),
            **{"max_steps": 12, "logging_steps": 1, "evaluation_strategy": "steps", "eval_steps": 4, "max_length": 128},
            **{"per_device_train_batch_size": 2, "learning_rate": 3e-3, "num_samples": 2, "max_new_tokens": 12},
            **{"disable_tqdm": True, **changes},
        }
        sft.run(settings, say=lambda text: None)
        found.append(folder / name)
    return found
