"""What the checks of a GPU share: the device, how much they measure, and the table at the end.

``SFT_TEST_GPU=cpu make test-gpu`` runs what a CPU can run of them, smaller and in float32, so that the checks
themselves are tried where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.gpu_facts import gpu_facts

FORCED = os.environ.get("SFT_TEST_GPU") == "cpu"
ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[BEGAN] = [], time.monotonic()


@pytest.fixture(scope="session")
def paddle() -> Any:
    """paddle on the GPU, or on the CPU where that is forced."""
    from sft import runtime

    runtime.prepare()
    module = importlib.import_module("paddle")
    runtime.use_device("cpu" if FORCED else "gpu")
    return module


@pytest.fixture
def on_gpu(paddle: Any) -> bool:
    return str(paddle.device.get_device()).startswith("gpu")


@pytest.fixture
def gpu(paddle: Any, on_gpu: bool) -> Any:
    """paddle, for checks that mean nothing on a CPU."""
    if not on_gpu:
        pytest.skip("a CPU cannot try this")
    return paddle


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str, Any, Any], None]:
    """``row(check, measured, tolerance)``: a line of the table; a float ``tolerance`` is asserted."""

    def add(check: str, measured: Any, tolerance: Any = "–") -> None:
        shown = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in (measured, tolerance)]
        request.config.stash[ROWS].append((check, *shown))
        if isinstance(tolerance, float):
            assert measured <= tolerance, check

    return add


@pytest.fixture(scope="session")
def cases() -> Path:
    """The tiny models of the core's tests, one a family."""
    return Path(__file__).parents[2] / "core" / "tests" / "fixtures" / "models"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A table to paste into an issue."""
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{' · '.join(_machine())} · {time.monotonic() - config.stash[BEGAN]:.0f} s")
    write("")
    for cells in (("check", "measured", "tolerance"), ("---", "---", "---"), *rows):
        write(f"| {' | '.join(cells)} |")


def _machine() -> list[str]:
    paddle = importlib.import_module("paddle")
    found = [f"paddle {paddle.__version__}", f"sft {importlib.metadata.version('sft-core')}"]
    if not str(paddle.device.get_device()).startswith("gpu"):
        return ["on a CPU, forced", *found]
    facts = gpu_facts()
    return [
        f"{facts['name']}, compute capability {facts['compute_capability']}, {facts['count']} of them",
        *[f"driver {facts['driver']}", f"CUDA {facts['cuda']}", f"cuDNN {facts['cudnn']}", f"NCCL {facts['nccl']}"],
        *found,
        ", ".join(f"{flag} {value}" for flag, value in facts["flags"].items()),
    ]
