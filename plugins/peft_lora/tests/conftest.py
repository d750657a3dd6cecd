"""The settings of this distribution's test runs; the rest of what they share is in plugins/conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"plugin": ["lora"], "learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture
def variant(adapter_variant: Callable[..., Path]) -> Callable[..., Path]:
    """``variant(change, **config)``: a copy of an adapter that PEFT wrote, changed."""
    return partial(adapter_variant, "llama-lora-all-linear")
