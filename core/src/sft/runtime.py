"""What must be set before paddle is imported: threads, BLAS dispatch, kernels. Variables that the user set win.

Measured on 2-core machines: paddle's bundled MKL runs with one thread unless OMP_NUM_THREADS says otherwise
(40 → 75 GFLOP/s of float32 GEMM), takes a generic path on AMD processors unless MKL_DEBUG_CPU_TYPE=5 selects
AVX2 (→ 170-215 GFLOP/s), and steps are 6-14 % faster without strided kernels.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ctypes.util
import importlib.util
import io
import os
import platform
import sys
import threading
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from sft.errors import UsageError


def physical_cores() -> int:
    """Physical cores that this process may run on (Linux; elsewhere the logical ones)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (folder / "physical_package_id").read_text().strip()
            cores.add((package, (folder / "core_id").read_text().strip()))
        except OSError:
            return len(allowed)
    return len(cores)


def cpu_info() -> dict[str, str]:
    """``vendor`` and ``model`` of the processor, empty where the system does not tell."""
    info = {"vendor": "", "model": platform.processor()}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "vendor_id":
                info["vendor"] = value.strip()
            elif key.strip() == "model name":
                info["model"] = value.strip()
                break
    except OSError:
        pass
    return info


def choose(environ: MutableMapping[str, str], cores: int, vendor: str) -> dict[str, str]:
    """The variables to set for ``cores`` and ``vendor``, leaving out those that ``environ`` already has."""
    wanted = {"OMP_NUM_THREADS": str(cores), "FLAGS_use_stride_kernel": "0"}
    if vendor == "AuthenticAMD":
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    return {name: value for name, value in wanted.items() if name not in environ}


def prepare() -> str:
    """Set the process up for paddle and return one line that says what was chosen.

    Raises :class:`UsageError` when no build of paddle is installed. Once paddle is imported its threads are
    fixed: the line then says so, and nothing is changed.
    """
    require_paddle()
    if "paddle" in sys.modules:
        threads = os.environ.get("OMP_NUM_THREADS", "1 (paddle's default)")
        return f"runtime: paddle was already imported and keeps its threads: {threads}"
    vendor = cpu_info()["vendor"]
    chosen = choose(os.environ, physical_cores(), vendor)
    kept = [name for name in ("OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE") if name in os.environ]
    os.environ.update(chosen)
    flushes = flush_denormals()
    _import_quietly()
    parts = [f"{name}={os.environ[name]}" + (" (yours)" if name in kept else "") for name in [*chosen, *kept]]
    parts.append("denormals are zero" if flushes else "denormals are kept")
    return f"runtime: {platform.machine()} {vendor}".rstrip() + ", " + ", ".join(parts)


def flush_denormals() -> bool:
    """Let this thread, and the threads that it starts from now on, take float32 denormals as zero (x86-64, glibc).

    paddle's softmax gives masked positions 1e-28 instead of 0, whose gradients are denormals by the million, and
    an operation on a denormal takes a hundred times as long: backward was measured to be five times slower.
    """
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return False
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    environment = (ctypes.c_uint32 * 8)()  # glibc's fenv_t: the x87 registers, then MXCSR
    if libm.fegetenv(environment) != 0:
        return False
    environment[7] |= 0x8040  # flush to zero, denormals are zero
    return bool(libm.fesetenv(environment) == 0)


def _import_quietly() -> None:
    """Import paddle and PaddleNLP without what they print about ccache, setuptools and several threads."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddle  # noqa: F401
        import paddlenlp.transformers  # noqa: F401
    # PaddleNLP 3.0.0b4 calls paddle's swiglu by its old name at every layer.
    warnings.filterwarnings("ignore", message=r"(?s).*swiglu.*is deprecated")


def is_one_of_many() -> bool:
    """Whether paddle's launcher has started this process beside others."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1) > 1


def leave(code: int) -> NoReturn:
    """End the process with ``code`` once Python's own exit handlers have run, and without those of its C++ libraries.

    In a process that has met others a thread of paddle's store goes on, which now and then aborts while the objects
    that it uses are destroyed: what had ended well would look killed.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
                stream.flush()
        os._exit(code)


def use_device(name: str) -> None:
    """Let paddle, which is imported, compute on ``cpu``, ``gpu`` (the first) or ``gpu:N``.

    Raises :class:`UsageError` for a device that is not there.
    """
    import paddle

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "gpu") or (number and (kind == "cpu" or not number.isdecimal())) or name.endswith(":"):
        raise UsageError(f"There is no device {name!r}; give cpu, gpu or gpu:N.")
    if kind == "gpu":
        if not paddle.is_compiled_with_cuda():
            raise UsageError(
                f"Device {name} is not there: the PaddlePaddle that is installed computes on CPUs alone; give cpu, or "
                "install sft-core[gpu]."
            )
        count = paddle.device.cuda.device_count()
        if int(number or 0) >= count:
            raise UsageError(f"Device {name} is not there: this machine has {count} GPUs; give cpu or a lower number.")
    paddle.device.set_device(name)


def require_paddle() -> None:
    """One clear sentence instead of a ModuleNotFoundError."""
    if importlib.util.find_spec("paddle") is None:
        raise UsageError(
            "PaddlePaddle is not installed; pip install 'sft-core[cpu]' for CPUs or 'sft-core[gpu]' for NVIDIA GPUs."
        )


def peak_memory_mib() -> int:
    """Highest memory use so far in MiB: of the GPU where paddle runs on one, else of this process."""
    import resource

    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated() >> 20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10


def machine() -> dict[str, Any]:
    """What ``run.json`` says about this machine."""
    import paddle

    info = cpu_info()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": info["model"] or info["vendor"],
        "cores": physical_cores(),
        "device": paddle.device.get_device(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }
