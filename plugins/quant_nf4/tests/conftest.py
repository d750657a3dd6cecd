"""What the tests of this distribution share beside plugins/conftest.py: settings, and what bitsandbytes computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="session")
def bitsandbytes() -> dict[str, np.ndarray]:
    """Weights, and what bitsandbytes makes of them; see make_bitsandbytes.py."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    return load_file(Path(__file__).parent / "fixtures" / "bitsandbytes.safetensors")
