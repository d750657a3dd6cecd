"""What must be set before paddle computes: threads, BLAS dispatch, kernels. Variables that the user set win.
All but one: where paddle was imported first, an ``OMP_NUM_THREADS`` of 1 that was set in Python cannot be told from
paddle's own. It is taken for paddle's, which the line says; set before Python starts it wins.

Measured on 2-core machines: paddle's bundled MKL runs with one thread unless OMP_NUM_THREADS says otherwise
(40 → 75 GFLOP/s of float32 GEMM), takes a generic path on AMD processors unless MKL_DEBUG_CPU_TYPE=5 selects
AVX2 (→ 170-215 GFLOP/s), and steps are 6-14 % faster without strided kernels, which a machine with a GPU keeps.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ctypes.util
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sft.errors import UsageError
from sft.freed_memory import keep_freed_memory
from sft.gpu_facts import gpu_facts
from sft.stopping import keep_handlers


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


VARIABLES = ("OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE")


def variables_to_set(environ: Mapping[str, str], cores: int, vendor: str) -> dict[str, str]:
    """The variables to set for ``cores`` and ``vendor``, leaving out those that ``environ`` already has."""
    wanted = {"OMP_NUM_THREADS": str(cores), "FLAGS_use_stride_kernel": "0"}
    if vendor == "AuthenticAMD":
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    return {name: value for name, value in wanted.items() if name not in environ}


_settled: dict[str, str] = {}
"""The variables that :func:`prepare` looked after, with the values that they got."""
_own: set[str] = set()
"""Those of them that were not the user's."""
_threads_taken = False
"""Whether an OMP_NUM_THREADS of 1 was taken for paddle's own."""


def prepare() -> str:
    """Set the process and this thread up for paddle and return one line that says what was chosen.

    Call it before anything is computed: a notebook begins with ``import sft; sft.prepare()``. Imported paddle changes
    nothing, its threads and its path are still free; only the path that it has multiplied matrices on stays, which
    the line then says. Later calls set up threads that have not been, and return the same line.

    Raises :class:`UsageError` when no build of paddle is installed.
    """
    require_paddle()
    vendor = cpu_info()["vendor"]
    if not _settled:
        _settle(vendor)
    _know_denormals()
    flushes, imported = flush_denormals(), "paddle" in sys.modules
    _import_quietly()
    keep_handlers(_meet_numpy)
    import paddle

    global _default_device
    if not imported:
        _default_device = paddle.device.get_device()
    openmp = library("libiomp5.so")
    if openmp is not None and "OMP_NUM_THREADS" in _own:
        openmp.omp_set_num_threads(int(_settled["OMP_NUM_THREADS"]))
    parts = [f"{name}={value}" + ("" if name in _own else " (yours)") for name, value in _settled.items()]
    parts.append("denormals are zero" if flushes else "denormals are kept")
    if keep_freed_memory():
        parts.append("freed memory is kept")
    line = f"runtime: {platform.machine()} {vendor}".rstrip() + ", " + ", ".join(parts)
    if _threads_taken and _settled["OMP_NUM_THREADS"] != "1":
        line += (
            "; paddle was imported before and OMP_NUM_THREADS was 1, as paddle itself sets it: for one thread set it "
            "before Python starts"
        )
    if computed_before():
        line += (
            "; but paddle has computed before, so matrix products stay on MKL's slow path: begin the program with "
            "import sft; sft.prepare()"
        )
    return line


def computed_before() -> bool:
    """Whether paddle had multiplied matrices in this process before :func:`prepare`, on another path of MKL than the
    command line's, which stays."""
    return "MKL_DEBUG_CPU_TYPE" in _own and mkl_path() not in (None, int(_settled["MKL_DEBUG_CPU_TYPE"]))


def _settle(vendor: str) -> None:
    """Decide about the variables, once; what the user set stays."""
    users = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    global _threads_taken
    # Imported paddle has set this one itself where nobody had. The user may have, with the same value and no trace.
    if "paddle" in sys.modules and users.get("OMP_NUM_THREADS") == "1" and not _began_with("OMP_NUM_THREADS"):
        del users["OMP_NUM_THREADS"]
        _threads_taken = True
    chosen = variables_to_set(users, physical_cores(), vendor)
    # Tensors that are views of others may be there, and would be lost without these kernels; and a GPU has less to copy
    # with them, as paddle has it by default.
    if "paddle" in sys.modules or likely_device() == "gpu":
        chosen.pop("FLAGS_use_stride_kernel", None)
    os.environ.update(chosen)
    _own.update(chosen)
    _settled.update({**chosen, **users})


def _began_with(name: str) -> bool:
    """Whether the variable was there when this process began."""
    try:
        return any(
            entry.startswith(f"{name}=".encode()) for entry in Path("/proc/self/environ").read_bytes().split(b"\0")
        )
    except OSError:
        return False


def library(name: str) -> ctypes.CDLL | None:
    """A library of the imported paddle's own; None where this build has none."""
    import paddle

    path = Path(paddle.__file__).parent / "libs" / name
    return ctypes.CDLL(str(path)) if path.is_file() else None


def mkl_path() -> int | None:
    """The path that paddle's MKL has chosen for this process, 0 being the generic one; None without MKL.

    It chooses at the first product, or here.
    """
    mkl = library("libmklml_intel.so")
    return None if mkl is None or not hasattr(mkl, "mkl_serv_cpu_detect") else int(mkl.mkl_serv_cpu_detect())


def _know_denormals() -> None:
    """Let numpy look at the limits of its types, which it does once, while the smallest numbers are not yet zero: it
    would warn of that in the midst of a run."""
    import numpy as np

    for kind in (np.float16, np.float32, np.float64):
        np.finfo(kind)


def flush_denormals() -> bool:
    """Let this thread, and the threads that it starts from now on, take float32 denormals as zero (x86-64, glibc).

    paddle's softmax gives masked positions 1e-28 instead of 0, whose gradients are denormals by the million, and
    an operation on a denormal takes a hundred times as long: backward was measured to be five times slower.
    """
    libm, environment = _control()
    if libm is None:
        return False
    environment[7] |= _FLUSH
    return bool(libm.fesetenv(environment) == 0)


def flushes_denormals() -> bool:
    """Whether this thread takes float32 denormals as zero."""
    _, control = _control()
    return control is not None and control[7] & _FLUSH == _FLUSH


_FLUSH = 0x8040  # MXCSR: flush to zero, denormals are zero


def _control() -> tuple[Any, Any]:
    """The C library, and this thread's glibc fenv_t: the x87 registers, then MXCSR. None where they are others."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None, None
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    environment = (ctypes.c_uint32 * 8)()
    return (libm, environment) if libm.fegetenv(environment) == 0 else (None, None)


def _import_quietly() -> None:
    """Import paddle without what they print about ccache, setuptools and several threads."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Paddle answers a SIGTERM with a trace of its own and the end.
        keep_handlers(lambda: importlib.import_module("paddle"))


def processes_of_run() -> int:
    """How many processes paddle's launcher has started, this one among them."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)


def leave(code: int) -> NoReturn:
    """End the process with ``code`` once Python's own exit handlers have run, and without those of its C++ libraries.

    In a process that has met others a thread of paddle's store goes on, which now and then aborts while the objects
    that it uses are destroyed: what had ended well would look killed. Ctrl-C leaves sooner.
    """
    try:
        # Its own handlers first, by which an idle pool's workers end; then it joins the threads.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        # Beside a lock that a daemon thread holds, or a pipe that nobody reads, a flush would wait for ever.
        flushing = threading.Thread(target=_flush_files, daemon=True)
        try:
            flushing.start()
            flushing.join(_FLUSHING)
        finally:
            os._exit(code)


_FLUSHING = 10.0
"""Seconds that :func:`leave` gives to what open files still hold."""


def _flush_files() -> None:
    """Write what open files hold, as the interpreter does where it takes them down; standard output is one of them."""
    files = io.IOBase.__bases__[0]  # asked itself, not the abstract class: that would look into every lazy module
    for one in gc.get_objects():
        if issubclass(type(one), files):
            with contextlib.suppress(Exception):  # closed, not for writing, or whoever read it has gone
                one.flush()


def likely_device() -> str:
    """``gpu`` or ``cpu``: which kind paddle will choose, as far as can be told without importing it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    there = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))
    if hidden or not there:
        return "cpu"
    try:
        importlib.metadata.version("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu"
    return "gpu"


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


def _meet_numpy() -> None:
    """With its first array paddle looks numpy's functions up, by Python called from C++: what a signal raises there
    aborts the process, so signals wait meanwhile."""
    import numpy as np
    import paddle

    paddle.to_tensor(np.zeros(1, np.float32), place=paddle.CPUPlace())


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
    with contextlib.suppress(OSError):
        # What getrusage gives on Linux begins with the peak of the process that started this one.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 20 if sys.platform == "darwin" else peak >> 10


def cpu_flags() -> set[str]:
    """The instructions that the processor has, as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split())


@contextlib.contextmanager
def restored(device: str | None) -> Iterator[None]:
    """What a run sets for itself is afterwards as it was before: paddle's device, where it asks for ``device``, and the
    variable that decides about cuBLAS's rounding."""
    before, rounding = "", os.environ.get(_TF32)
    if device is not None and "paddle" in sys.modules:
        import paddle

        before = paddle.device.get_device()
    try:
        yield
    finally:
        os.environ.pop(_TF32, None)
        if rounding is not None:
            os.environ[_TF32] = rounding
        before = before or _default_device
        if device is not None and before:
            import paddle

            paddle.device.set_device(before)


_TF32 = "NVIDIA_TF32_OVERRIDE"
_default_device = ""
"""What paddle chose when :func:`prepare` imported it."""


def exact_products() -> None:
    """Let cuBLAS keep all bits of the factors of float32 products, of which it may round off all but ten."""
    os.environ[_TF32] = "0"


def machine() -> dict[str, Any]:
    """What ``run.json`` says about this machine."""
    import paddle

    info, gpu = cpu_info(), gpu_facts()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": info["model"] or info["vendor"],
        "cores": physical_cores(),
        "device": paddle.device.get_device(),
        **({"gpu": gpu} if gpu else {}),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "runtime": prepare(),
        "stride_kernels": bool(paddle.get_flags("FLAGS_use_stride_kernel")["FLAGS_use_stride_kernel"]),
    }
