"""What the tests of the native code share: each level of it that this processor runs."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sft
from sft_kernels_cpu.library import LEVELS, native

COMPILERS = [
    found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))
]


class Nothing(sft.Kernels):
    """Fails where the native code leaves something to others."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("arithmetic", "narrow", "kept", "restored"):
            return super().__getattribute__(name)
        raise AssertionError(f"{name} was left to other kernels")


@pytest.fixture(params=list(LEVELS))
def library(request: pytest.FixtureRequest, paddle: Any) -> Any:
    """The native library at one level, or at the best one where a test asks for level None; skipped, saying why, where
    this machine cannot have it."""
    found = native(request.param)
    if isinstance(found, str):
        assert "sources changed" not in found, found
        assert "does not load" not in found, found
        is_for_all = request.param in (None, "base") or platform.machine() in ("x86_64", "AMD64")
        assert "was not built" not in found or not (COMPILERS and is_for_all), f"{found}, and there is {COMPILERS[0]}"
        pytest.skip(f"native code, {request.param or 'any level'}: {found}")
    return found


@pytest.fixture
def kernels(library: Any) -> sft.Kernels:
    from sft_kernels_cpu.kernels import NativeKernels

    return NativeKernels(library, Nothing())


@pytest.fixture
def threads(paddle: Any) -> Iterator[Callable[[int], None]]:
    """``threads(n)`` lets paddle's OpenMP compute with n threads, until the test ends."""
    openmp = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libiomp5.so"))
    before = openmp.omp_get_max_threads()
    yield openmp.omp_set_num_threads
    openmp.omp_set_num_threads(before)


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}
