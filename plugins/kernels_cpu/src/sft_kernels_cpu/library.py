"""The native library: the levels that were built, the one that this processor runs, and its functions.

Its threads are those of paddle's own OpenMP. That has to be there first, for all to see; it answers the calls of every
compiler's OpenMP, gcc's too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import zlib
from ctypes import c_float, c_int, c_int64, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

LEVELS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"},
    "avx2": {"avx2", "fma"},
    "base": set[str](),
}
"""The best one first, each with the processor's instructions that it needs, as Linux names them."""
LANES = {"avx512": 16, "avx2": 8, "base": 4}
"""How many float32 values a vector has."""

_FUNCTIONS = {
    "rms_norm": (*[c_void_p] * 4, c_int64, c_int64, c_float, c_float),
    "rms_norm_slope": (*[c_void_p] * 5, c_int64, c_int64, c_float),
    "rms_norm_weight_slope": (*[c_void_p] * 4, c_int64, c_int64),
    "rotate": (*[c_void_p] * 4, *[c_int64] * 6, c_float),
    "gated": (*[c_void_p] * 3, c_int64, c_int64),
    "gated_slope": (*[c_void_p] * 5, c_int64, c_int64),
    "cross_entropy": (*[c_void_p] * 3, c_int64, c_int64),
    "repeated": (c_void_p, c_void_p, c_int64, c_int64),
    "four_bits": (*[c_void_p] * 4, c_int64, c_int64),
    "attention": (*[c_void_p] * 5, *[c_int64] * 5, c_float, c_float, *[c_void_p] * 2),
    "attention_slope": (*[c_void_p] * 8, *[c_int64] * 6, c_float, c_float, *[c_void_p] * 4),
    "few_rows": (*[c_void_p] * 4, *[c_int64] * 5, *[c_void_p] * 2, c_int64, c_float),
    "attention_of_one": (*[c_void_p] * 7, *[c_int64] * 6, c_float, c_float),
}
_MAY_LACK_MEMORY = ("attention", "attention_slope", "few_rows", "attention_of_one")
"""They return 0 where there was none."""


@cache
def instructions() -> frozenset[str]:
    """What this processor can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


@cache
def native(level: str | None = None) -> Any:
    """The library of ``level``, or of the best level that was built and that this processor runs; or, as a ``str``, why
    there is none: the end of a sentence."""
    import paddle

    openmp = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    if not openmp.exists():
        return "this build of paddle has no libiomp5.so"
    reasons = []
    for name in LEVELS if level is None else (level,):
        found = importlib.util.find_spec(f"sft_kernels_cpu._{name}")
        missing = LEVELS[name] - instructions()
        if found is None or found.origin is None:
            reasons.append("it was not built, for want of a C++ compiler that can")
        elif missing:
            reasons.append(f"this processor lacks {' and '.join(sorted(missing))}")
        else:
            try:
                ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
                library: Any = ctypes.CDLL(found.origin)
            except OSError as error:
                reasons.append(f"it does not load ({error})")
                continue
            if _is_stale(library):
                reasons.append("it was built before its sources changed; run pip install -e plugins/kernels_cpu again")
                continue
            for function, arguments in _FUNCTIONS.items():
                one = getattr(library, function)
                one.argtypes, one.restype = arguments, c_int if function in _MAY_LACK_MEMORY else None
            library.level = name
            return library
    return reasons[-1]


def _is_stale(library: Any) -> bool:
    """Whether a checkout, where sources lie beside the package, has others now than those of ``library``: a function
    that takes other arguments would read memory that is not its own."""
    headers = sorted((Path(__file__).parents[2] / "native").glob("*.h"))
    if not headers:
        return False
    if not hasattr(library, "sources"):
        return True
    library.sources.restype = c_uint
    return bool(library.sources() != zlib.crc32(b"".join(path.read_bytes() for path in headers)))


@cache
def blas() -> Any | None:
    """``cblas_sgemm`` of paddle's own MKL, which paddle's products of matrices are too; None where it has none."""
    import paddle

    path = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    try:
        function = ctypes.CDLL(str(path)).cblas_sgemm
    except (OSError, AttributeError):
        return None
    matrix = c_void_p, c_int
    function.argtypes = (*[c_int] * 6, c_float, *matrix, *matrix, c_float, *matrix)
    function.restype = None
    return function


def for_width(library: Any, width: int) -> Any | None:
    """The library of the best level, from that of ``library`` down, with vectors of which ``width`` values are whole
    ones; None where there is none."""
    levels = list(LEVELS)
    for level in levels[levels.index(library.level) :]:
        if width % LANES[level] == 0:
            found = library if level == library.level else native(level)
            if not isinstance(found, str):
                return found
    return None
