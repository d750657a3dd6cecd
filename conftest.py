"""Tests compute on CPUs, whatever the machine has: a GPU is only for those marked ``gpu``, by ``make test-gpu``."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # read when CUDA starts: float32 products keep all their bits, as in a run that asks for them
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
