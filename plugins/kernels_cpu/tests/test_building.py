"""The wheel, where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path: Path) -> None:
    for name in ("src", "native"):
        shutil.copytree(HERE / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copyfile(HERE / name, tmp_path / "source" / name)
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(line, check=True, capture_output=True, timeout=100, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    assert not list((tmp_path / "installed").rglob("*.so"))
    script = "import sft_kernels_cpu.library as it; print(it.__file__); print(it.native())"
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=100, env=environment
    )
    where, why = found.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert why == "it was not built, for want of a C++ compiler that can"


def test_a_library_of_other_sources_is_not_called() -> None:
    from sft_kernels_cpu import library

    class Built:
        @staticmethod
        def sources() -> int:
            return 1

    headers = sorted((HERE / "native").glob("*.h"))
    own = zlib.crc32(b"".join(path.read_bytes() for path in headers))
    assert library._is_stale(Built)
    assert library._is_stale(object())  # from before there was such a number
    Built.sources = staticmethod(lambda: own)  # type: ignore[method-assign]
    assert not library._is_stale(Built)
