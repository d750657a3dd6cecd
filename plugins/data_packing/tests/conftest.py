"""The settings and data of this distribution's test runs; the rest of what they share is in plugins/conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.testing import write_data


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-3, "max_steps": 3}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 train and 8 dev records, whose lengths differ much."""
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n * 7 % 9) + "."} for n in range(32)]
    return write_data(tmp_path_factory.mktemp("data"), records[:24], records[24:])
