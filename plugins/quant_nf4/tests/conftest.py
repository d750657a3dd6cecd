"""What the tests of this distribution share beside plugins/conftest.py: settings, and what bitsandbytes computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_quant_nf4.codes import CODEBOOKS, DYNAMIC, Blocks, Channels


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="session")
def bitsandbytes() -> dict[str, np.ndarray]:
    """Weights, and what bitsandbytes makes of them; see make_bitsandbytes.py."""
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import load_file

    return load_file(Path(__file__).parent / "fixtures" / "bitsandbytes.safetensors")


@pytest.fixture(scope="session")
def read() -> Callable[[Blocks | Channels], np.ndarray]:
    """What is stored, read value by value as the formats define it: float32 [out, in]."""
    return lambda stored: _blocks(stored) if isinstance(stored, Blocks) else _channels(stored)


def _blocks(stored: Blocks) -> np.ndarray:
    size = stored.shape[0] * stored.shape[1]
    code = np.stack([stored.codes >> 4, stored.codes & 15], axis=1).reshape(-1)[:size]
    absmax, double = stored.absmax, stored.double
    if absmax is None:
        assert double is not None
        absmax = DYNAMIC[double.codes] * double.absmax[np.arange(len(double.codes)) // 256] + double.offset
    return (CODEBOOKS[stored.kind][code] * absmax[np.arange(size) // stored.blocksize]).reshape(stored.shape)


def _channels(stored: Channels) -> np.ndarray:
    out, size = stored.shape
    whole = stored.codes.astype(np.float32)
    if stored.bits == 4:
        whole = np.stack([stored.codes >> 4, stored.codes & 15], axis=-1).reshape(out, -1)[:, :size] - np.float32(8)
    return whole * stored.scales.repeat(size // stored.scales.shape[1], axis=1)
