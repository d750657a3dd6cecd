"""The arithmetic of a run: what, beside settings and data, the last bits of its numbers depend on."""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Mapping
from typing import Any

from sft.runtime import (
    cpu_flags,
    cpu_info,
    flushes_denormals,
    library,
    mkl_path,
    physical_cores,
    processes_of_run,
)

FEATURES = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
"""Of a processor's instructions those by which paddle, MKL and oneDNN choose what to run."""
USERS = (
    *("OMP_THREAD_LIMIT", "OMP_SCHEDULE", "KMP_DETERMINISTIC_REDUCTION", "KMP_FORCE_REDUCTION"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
"""Variables that libraries read, and do not tell what came of it."""
TF32 = "NVIDIA_TF32_OVERRIDE"


def in_effect() -> dict[str, Any]:
    """Of this process, whose paddle is set up, by names for ``run.json``. What computes a model adds its own later."""
    import paddle

    openmp, mkl, onednn = library("libiomp5.so"), library("libmklml_intel.so"), library("libdnnl.so.3")
    found: dict[str, Any] = {
        "paddle": paddle.__version__,
        "paddle_commit": paddle.version.commit[:12],
        "libc": " ".join(platform.libc_ver()),
        "device": paddle.device.get_device(),
        "cpu": cpu_info()["model"] or cpu_info()["vendor"],
        "cpu_features": " ".join(feature for feature in FEATURES if feature in cpu_flags()),
        "cores": physical_cores(),
        "processes": processes_of_run(),
        "threads": os.environ.get("OMP_NUM_THREADS", "") if openmp is None else int(openmp.omp_get_max_threads()),
        "dynamic_threads": openmp is not None and bool(openmp.omp_get_dynamic()),
        "mkl_threads": None if mkl is None else int(mkl.MKL_Get_Max_Threads()),
        "mkl_dynamic": None if mkl is None else bool(mkl.MKL_Get_Dynamic()),
        "mkl_path": mkl_path(),
        "onednn_isa": None if onednn is None else f"{onednn.dnnl_get_effective_cpu_isa():#x}",
        "onednn_kernels": bool(paddle.get_flags("FLAGS_use_mkldnn")["FLAGS_use_mkldnn"]),
        "denormals": "zero" if flushes_denormals() else "kept",
    }
    variables = [*USERS]
    if found["device"].startswith("gpu"):
        found["gpu"] = paddle.device.cuda.get_device_name()
        found["cuda"], found["cudnn"] = paddle.version.cuda(), paddle.version.cudnn()
        variables.append(TF32)
    return {**found, **{name: os.environ[name] for name in variables if name in os.environ}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two of :func:`in_effect`, in words; empty if nothing does."""
    unknown = _LATER - set(before)  # to the version that wrote it
    names = [name for name in {**before, **now} if name not in unknown and before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name, 'unset')} (now {now.get(name, 'unset')})" for name in names)


def digest(found: Mapping[str, Any]) -> int:
    """A number below 65,521 that tells two of :func:`in_effect` apart, whichever device of its kind each is on."""
    kept = {name: value for name, value in found.items() if name != "device"}
    return zlib.crc32(json.dumps(kept, sort_keys=True, default=str).encode()) % 65521


_LATER = {
    "kernels",
    "attention_backend",
    "paddle_commit",
    "libc",
    "processes",
    "mkl_dynamic",
    "onednn_isa",
    "onednn_kernels",
    "cuda",
    "cudnn",
}
"""What the first checkpoints with an arithmetic do not tell."""
