"""What is made of measured values: medians, spreads, ratios, exponents; and the facts of the machine beside them."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WRITTEN = ("benchmarks/results", "docs/performance.md", "docs/zh/performance.md")
"""What benchmarks change while they measure."""
DATE = "%Y-%m-%d %H:%M UTC"
"""How a result says when its measurement began."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median, the quartiles (``low``, ``high``) and the values themselves, with four significant digits."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": significant(statistics.median(values)),
        "low": significant(low),
        "high": significant(high),
        "values": [significant(value) for value in values],
    }


def ratio(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool) -> dict[str, float]:
    """How many times better ``ours`` is: the median of the ratios turn by turn, and their quartiles.

    Both have a value for each turn. Above 1, ours is ahead, of speeds and of seconds alike.
    """
    over, under = (ours, theirs) if more_is_better else (theirs, ours)
    pairs = summary([a / b for a, b in zip(over, under, strict=True)])
    return {"ratio": pairs["median"], "low": pairs["low"], "high": pairs["high"]}


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(a, e) of the law a · sizeᵉ that is nearest to ``values``: least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
    exponent = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - middle_x) ** 2 for a in x
    )
    return math.exp(middle_y - exponent * middle_x), exponent


def significant(value: float, digits: int = 4) -> float:
    """``value`` with so many significant digits."""
    return float(f"{value:.{digits}g}")


def machine() -> dict[str, Any]:
    """The machine that measures, as far as figures depend on it."""
    model, flags = platform.processor(), ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = value
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in FLAGS if flag in flags.split()],
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def moment() -> dict[str, Any]:
    """When, of which commit, and how busy the machine was (the processes that wanted to run in the last minute)."""
    return {
        "date": datetime.now(timezone.utc).strftime(DATE),
        "commit": commit(ROOT),
        "load_before": round(os.getloadavg()[0], 1),
    }


def commit(folder: Path) -> str:
    """The commit of ``folder``, with ``-dirty`` behind it if a file is changed that no benchmark writes itself."""

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()

    name = said("describe", "--always")
    changed = said("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    return f"{name}-dirty" if name and changed else name or "unknown"
