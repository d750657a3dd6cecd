"""Tests compute on CPUs, whatever the machine has: a GPU is only for those marked ``gpu``, by ``make test-gpu``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from sft.runtime import likely_device

pytest_plugins = ["sft.testing"]

NONE = (
    "There is no GPU here, or PaddlePaddle's build for GPUs is missing, so nothing was checked; README.md says how to "
    "install it."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=share, metavar="K/N", help="of N shares of the tests, run share K, from 0 on")


def share(text: str) -> slice:
    which, _, of = text.partition("/")
    if not 0 <= int(which) < int(of):
        raise ValueError(text)
    return slice(int(which), None, int(of))


def pytest_configure(config: pytest.Config) -> None:
    os.environ["SFT_LANG"] = "en"  # whatever the machine speaks
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # read when CUDA starts: float32 products keep all their bits, so that their tolerances can be narrow
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if getattr(config, "cache", None) and os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        # Asked for so that the tree stays clean. What tests start is timed and started hundreds of times: as its users
        # have it, it is compiled once.
        os.environ["PYTHONPYCACHEPREFIX"] = str(config.cache.mkdir("bytecode"))
    _hear_signals()


def _hear_signals() -> None:
    """As in a terminal, also under nohup or in the background of a script, where some are ignored: by this process, and
    by all that it starts."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


def _lacks_gpu(config: pytest.Config) -> bool:
    forced = os.environ.get("SFT_TEST_GPU") == "cpu"
    return config.option.markexpr == "gpu" and not forced and likely_device() != "gpu"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    if _lacks_gpu(config):
        config.hook.pytest_deselected(items=list(items))
        items.clear()
    yield
    if config.option.share is not None:  # of what -m and -k have left
        chosen = items[config.option.share]
        config.hook.pytest_deselected(items=list(set(items).difference(chosen)))
        items[:] = chosen


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _lacks_gpu(config):
        terminalreporter.write_line(NONE)
