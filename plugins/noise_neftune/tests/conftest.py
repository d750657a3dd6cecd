"""What the tests of this distribution share, beside sft's testing kit: models and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.testing import adapt, dataset, logits_of, paddle, train  # noqa: F401


@pytest.fixture(scope="session")
def models() -> Path:
    """The tiny base models of the core's tests, with reference values."""
    return Path(__file__).parents[3] / "core" / "tests" / "fixtures" / "models"


@pytest.fixture(scope="session")
def base_model(models: Path) -> Path:
    return models / "llama-tied-gqa"


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"plugin": ["neftune"], "learning_rate": 1e-3, "max_steps": 3}
