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
    name, capability = paddle.device.cuda.get_device_name(), paddle.device.cuda.get_device_capability()
    flags = ("FLAGS_flash_attn_version", "FLAGS_cudnn_deterministic")
    return [
        f"{name}, compute capability {capability[0]}.{capability[1]}, {paddle.device.cuda.device_count()} of them",
        *[f"driver {_driver()}", f"CUDA {paddle.version.cuda()}", f"cuDNN {paddle.version.cudnn()}"],
        *[f"NCCL {paddle.version.nccl()}", *found],
        ", ".join(f"{flag} {value}" for flag, value in paddle.get_flags(list(flags)).items()),
    ]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"
