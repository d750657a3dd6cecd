"""The settings of this distribution's test runs; the rest of what they share is in plugins/conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft.inference.merge import merge
from sft.testing import load


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"plugin": ["lora"], "learning_rate": 1e-2, "max_steps": 3}


@pytest.fixture
def variant(adapter_variant: Callable[..., Path]) -> Callable[..., Path]:
    """``variant(change, **config)``: a copy of an adapter that PEFT wrote, changed."""
    return partial(adapter_variant, "llama-lora-all-linear")


@pytest.fixture
def assert_logits_are_pefts(
    paddle: Any, models: Path, peft: Path, tmp_path: Path, logits_of: Callable[..., Any]
) -> Callable[[str, str], None]:
    """``assert_logits_are_pefts(case, base)``: of an adapter that PEFT wrote, on its base and merged into it."""

    def check(case: str, base: str) -> None:
        expected = load_file(peft / case / "reference.safetensors")
        found = logits_of(load(models / base, peft / case), expected["input_ids"])
        np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)
        merge(str(models / base), peft / case, tmp_path / "merged", lambda text: None)
        merged = logits_of(load(tmp_path / "merged"), expected["input_ids"])
        np.testing.assert_allclose(merged, expected["merged_logits"], atol=1e-4, rtol=0)

    return check
