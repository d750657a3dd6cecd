"""Builds the native library: the same source once for each level of processor. What cannot be built is left out."""

from __future__ import annotations

import platform
import zlib
from pathlib import Path

from setuptools import Extension, setup

LEVELS = {"base": [], "avx2": ["-mavx2", "-mfma"]}
LEVELS["avx512"] = [*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# OpenMP's functions come from paddle's own library when this one is loaded, so none is linked: two pools of threads
# would wait for each other.
FLAGS = ["-std=gnu++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]

# By this number the package knows a library that was built before its sources changed.
SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path("native").glob("*.h"))))

setup(
    ext_modules=[
        Extension(
            f"sft_kernels_cpu._{level}",
            [f"native/{level}.cpp"],
            depends=[f"native/{name}.h" for name in ("vectors", "pieces", "attention", "few_rows")],
            define_macros=[("SOURCES", f"{SOURCES}u")],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for level, flags in LEVELS.items()
        if level == "base" or platform.machine() in ("x86_64", "AMD64")
    ]
)
