"""The settings of this distribution's test runs; the rest of what they share is in plugins/conftest.py."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
