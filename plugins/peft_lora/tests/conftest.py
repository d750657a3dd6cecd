"""What the tests of this distribution share, beside sft's testing kit: models, and adapters that HF PEFT wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.testing import adapt, dataset, forward, fresh_logits, logits_of, paddle, train  # noqa: F401


@pytest.fixture(scope="session")
def models() -> Path:
    """The tiny base models of the core's tests, with reference values."""
    return Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "models"


@pytest.fixture(scope="session")
def base_model(models: Path) -> Path:
    return models / "llama-tied-gqa"


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"plugin": ["lora"], "learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture(scope="session")
def peft() -> Path:
    """Adapters as HF PEFT wrote them, with what PEFT computes; see make_peft.py."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def input_ids(models: Path) -> np.ndarray:
    """int64 [2, 17], of llama-tied-gqa's reference values."""
    from safetensors.numpy import load_file

    return np.asarray(load_file(models / "llama-tied-gqa" / "reference.safetensors")["input_ids"])


@pytest.fixture
def looking(input_ids: np.ndarray) -> tuple[type[sft.Plugin], list[np.ndarray]]:
    """A plugin, and the list into which it puts the trained model's logits."""
    found: list[np.ndarray] = []

    class Look(sft.Plugin):
        name = "look"

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            found.append(forward(run.model, input_ids))

    return Look, found
