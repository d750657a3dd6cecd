"""The process's set-up: what is chosen for a machine, that a user's own variables win, and what is said."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft import arithmetic, runtime
from sft.training.manifest import write_manifest

INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize("vendor", [INTEL, "", "ARM"])
def test_threads_and_kernels_are_chosen_everywhere(vendor: str) -> None:
    assert runtime.variables_to_set({}, 6, vendor) == {"OMP_NUM_THREADS": "6", "FLAGS_use_stride_kernel": "0"}


def test_on_amd_mkl_is_told_to_use_avx2() -> None:
    assert runtime.variables_to_set({}, 2, AMD) == {
        "OMP_NUM_THREADS": "2",
        "FLAGS_use_stride_kernel": "0",
        "MKL_DEBUG_CPU_TYPE": "5",
    }


@pytest.mark.parametrize(("device", "found"), [("cpu", "0"), ("gpu", None)])
def test_strided_kernels_are_switched_off_for_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, found: str | None
) -> None:
    monkeypatch.setattr(runtime, "_settled", {})
    monkeypatch.setattr(runtime, "_own", set())
    monkeypatch.setattr(runtime, "likely_device", lambda: device)
    monkeypatch.setattr(runtime.os, "environ", {})
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    runtime._settle("GenuineIntel")
    assert runtime.os.environ.get("FLAGS_use_stride_kernel") == found
    assert runtime._settled.get("FLAGS_use_stride_kernel") == found


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE"])
def test_a_users_variables_are_left_alone(name: str) -> None:
    environ = {name: "7"}
    chosen = runtime.variables_to_set(environ, 2, AMD)
    assert set(chosen) == {"OMP_NUM_THREADS", "FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE"} - {name}
    assert environ == {name: "7"}


def test_physical_cores_are_at_least_one_and_at_most_the_logical_ones() -> None:
    assert 1 <= runtime.physical_cores() <= (os.cpu_count() or 1)


def test_only_cores_that_the_process_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert runtime.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_two_threads_of_one_core_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four logical processors: two threads on each of two cores of one package."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    place = {f"/sys/devices/system/cpu/cpu{cpu}/topology/core_id": str(cpu % 2) for cpu in range(4)}
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: place.get(str(self), "0\n"))
    assert runtime.physical_cores() == 2


def test_without_a_topology_the_logical_processors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path, *arguments: Any, **rest: Any) -> str:
        raise OSError

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(Path, "read_text", unreadable)
    assert runtime.physical_cores() == 3
    assert runtime.cpu_info()["vendor"] == ""


def test_the_processor_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC: 64 cores\n\nvendor_id : other\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: text)
    assert runtime.cpu_info() == {"vendor": "AuthenticAMD", "model": "AMD EPYC: 64 cores"}


SCRIPT = """
import json, os, sys
from sft import runtime
runtime.cpu_info = lambda: {"vendor": "AuthenticAMD", "model": "x"}
runtime.physical_cores = lambda: 3
assert "paddle" not in sys.modules
line = runtime.prepare()
import paddle
flag = paddle.get_flags("FLAGS_use_stride_kernel")["FLAGS_use_stride_kernel"]
threads, mkl = os.environ["OMP_NUM_THREADS"], os.environ["MKL_DEBUG_CPU_TYPE"]
print(json.dumps([line, flag, threads, mkl, runtime.prepare()]))
"""


def test_a_fresh_process_is_set_up_before_paddle_is_imported() -> None:
    """And one line says what was chosen, and what was the user's; nothing of paddle's own chatter gets through."""
    environ = {k: v for k, v in os.environ.items() if k not in ("FLAGS_use_stride_kernel", "MKL_DEBUG_CPU_TYPE")}
    environ = {k: v for k, v in environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    line, flag, threads, mkl, again = json.loads(done.stdout)
    assert line.startswith(f"runtime: {os.uname().machine} AuthenticAMD, ")
    chosen = line.partition("AuthenticAMD, ")[2].split(", ")
    denormals = f"denormals are {'zero' if os.uname().machine == 'x86_64' else 'kept'}"
    assert set(chosen) == {
        "FLAGS_use_stride_kernel=0",
        "MKL_DEBUG_CPU_TYPE=5",
        "OMP_NUM_THREADS=1 (yours)",
        denormals,
        "freed memory is kept",
    }
    assert (flag, threads, mkl) == (False, "1", "5")
    assert again == line
    assert not [word for word in ("warn", "ccache", "swiglu") if word in done.stderr.lower()], done.stderr


TRAIN = """
import hashlib, json, sys
first, settings = sys.argv[1], json.loads(sys.argv[2])
if first:
    import paddle
if first == "product":
    paddle.matmul(paddle.ones([8, 8]), paddle.ones([8, 8]))
import sft
said = []
sft.run(settings, say=said.append)
weights = open(settings["output_dir"] + "/model.safetensors", "rb").read()
print(json.dumps([hashlib.sha256(weights).hexdigest(), [line for line in said if line.startswith("runtime")]]))
"""


def trained(first: str, folder: Path, model: Path, dataset: Path) -> subprocess.Popen[str]:
    """A process that trains after importing ``first``, as a user starts it: without variables."""
    settings = {
        "model_name_or_path": str(model),
        "dataset_name_or_path": str(dataset),
        "output_dir": str(folder / (first or "plain")),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "do_eval": False,
        "disable_tqdm": True,
    }
    environ = {name: value for name, value in os.environ.items() if name not in runtime.VARIABLES}
    line = [sys.executable, "-c", TRAIN, first, json.dumps(settings)]
    return subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_trap_paddle_imported_first_computes_the_same_bits(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """In a notebook ``import paddle`` comes before sft. Its threads and its path of MKL are still free then; only after
    a product the path is not, on AMD, and then the line says so and run.json has it. Strided kernels stay on, for
    tensors that need them, and change no bit."""
    kinds = ["", "paddle", "product"]
    processes = [trained(first, tmp_path, base_model, dataset) for first in kinds]
    plain, imported, product = (json.loads(process.communicate(timeout=100)[0]) for process in processes)
    assert imported[0] == plain[0]
    (line,) = imported[1]
    assert line.partition("; paddle was imported before")[0] == plain[1][0].replace("FLAGS_use_stride_kernel=0, ", "")
    reports = [json.loads((tmp_path / (kind or "plain") / "run.json").read_text())["arithmetic"] for kind in kinds]
    assert reports[1] == reports[0]
    assert reports[0]["threads"] == runtime.physical_cores()
    if runtime.cpu_info()["vendor"] == AMD:
        assert product[1][0].startswith(imported[1][0] + "; but paddle has computed before")
        assert "begin the program with import sft; sft.prepare()" in product[1][0]
        assert arithmetic.differences(reports[0], reports[2]) == "mkl_path 5 (now 0)"
    else:
        assert product == imported
        assert reports[2] == reports[0]


def test_a_resumed_run_says_what_is_computed_otherwise(
    train: Any, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """In one line; nothing where nothing differs, nor where the checkpoint does not say."""
    settings = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    train("out", max_steps=2, **settings)
    state = tmp_path / "out" / "checkpoint-2" / "trainer" / "state.json"
    written = json.loads(state.read_text())
    assert written["arithmetic"] == json.loads((tmp_path / "out" / "run.json").read_text())["arithmetic"]
    assert written["arithmetic"]["paddle"]
    assert written["arithmetic"]["cpu"] == (runtime.cpu_info()["model"] or runtime.cpu_info()["vendor"])

    def notes(folder: str) -> list[str]:
        said: list[str] = []
        train(folder, say=said.append, max_steps=3, resume_from_checkpoint=str(state.parents[1]), **settings)
        return [line for line in said if "arithmetic" in line]

    assert notes("same") == []
    threads = written["arithmetic"]["threads"]
    more = {
        **{name: value for name, value in os.environ.items() if name not in runtime.VARIABLES},
        "OMP_NUM_THREADS": str(threads + 1),
    }
    resumed = {**settings, "model_name_or_path": base_model, "dataset_name_or_path": dataset, "max_steps": 3}
    resumed.update(output_dir=tmp_path / "other", resume_from_checkpoint=state.parents[1])
    line = [sys.executable, "-m", "sft", "run", *(f"--{name}={value}" for name, value in resumed.items())]
    done = subprocess.run(line, env=more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stdout.splitlines() if "arithmetic" in line]
    assert note.startswith("note: checkpoint-2 was computed with another arithmetic, ")
    assert f"threads {threads} (now {threads + 1})" in note
    assert "cpu" not in note

    del written["arithmetic"]
    state.write_text(json.dumps(written))
    write_manifest(state.parents[1])
    assert notes("silent") == []


def test_what_a_run_sets_for_itself_ends_with_it(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, and cuBLAS's rounding."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    places = ["gpu:1"]
    monkeypatch.setattr(runtime, "use_device", places.append)
    monkeypatch.setattr(paddle.device, "set_device", places.append)
    monkeypatch.setattr(paddle.device, "get_device", lambda: places[-1])
    with runtime.restored("cpu"):
        runtime.use_device("cpu")
        runtime.exact_products()
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert places == ["gpu:1", "cpu", "gpu:1"]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"
    with runtime.restored(None):  # nobody asked for a device: what several processes agreed on stays
        runtime.use_device("gpu:3")
    assert places[-1] == "gpu:3"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_on_a_device_of_its_own_leaves_the_next_one_where_it_was(
    paddle: Any, train: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Whether it ends or fails."""
    places: list[str] = []
    monkeypatch.setattr(runtime, "use_device", lambda name: places.append(f"run on {name}"))
    monkeypatch.setattr(paddle.device, "set_device", places.append)

    class Fails(sft.Plugin):
        name = "fails"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            if fails:
                raise sft.UsageError("it fails")

    with pytest.raises(sft.UsageError, match="it fails") if fails else contextlib.nullcontext():
        train(device="cpu", max_steps=1, plugins=(Fails,))
    assert places == ["run on cpu", "cpu"]


def test_without_paddle_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sft.UsageError, match=r"PaddlePaddle is not installed; pip install 'sft-core\[cpu\]'"):
        runtime.prepare()


def test_peak_memory_grows_with_what_is_used(paddle: Any) -> None:
    """Enough is taken to go 64 MiB beyond the process's peak so far."""
    before = runtime.peak_memory_mib()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    block = mmap.mmap(-1, (before - now + 64) << 20)  # from the system, not from what the process has kept
    np.frombuffer(block, np.uint8)[:] = 1
    grown = runtime.peak_memory_mib() - before
    assert len(block) >= 64 << 20
    assert 32 <= grown <= 256


@pytest.mark.slow
def test_the_peak_is_that_of_the_process_alone(paddle: Any) -> None:
    """Not that of a larger one that started it."""
    block = np.ones(600 << 20, np.uint8)
    line = [sys.executable, "-c", "import paddle; from sft import runtime; print(runtime.peak_memory_mib())"]
    found = int(subprocess.run(line, capture_output=True, text=True, check=True, timeout=100).stdout.split()[-1])
    assert 50 < found < block.size >> 20


def test_the_machine_is_described(paddle: Any) -> None:
    found = runtime.machine()
    assert set(found) == {"system", "python", "cpu", "cores", "device", "threads", "runtime", "stride_kernels"}
    assert found["runtime"] == runtime.prepare()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device"] == paddle.device.get_device()
    assert found["cores"] == runtime.physical_cores()


DENORMALS = """
import numpy as np
import paddle

def kept():
    # Large enough that every thread of the pool takes a share.
    small = paddle.to_tensor(np.full((512, 512), 1e-40, np.float32))
    product = paddle.matmul(small, paddle.ones([512, 512]))
    return int((product.numpy() != 0).sum()), int(((small * 0.5).numpy() != 0).sum())

before = kept()  # threads exist from here on
import sft
sft.prepare()
print(*before, *kept())
import warnings
warnings.simplefilter("error")
np.finfo(np.float32), np.finfo(np.float64)  # numpy warns where the smallest numbers are zero
"""


FIRST_ARRAY = """
import sys
import numpy as np
import sft
sft.prepare()
import paddle
called = []
sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_filename))
paddle.to_tensor(np.ones([2, 3], np.float32))
sys.setprofile(None)
print(sum("numpy" in name and "_version" in name for name in called), len(called) > 0)
"""


@pytest.mark.slow
def test_no_python_is_called_from_c_in_paddles_first_array() -> None:
    """There a signal would abort the process instead of ending the run."""
    done = subprocess.run([sys.executable, "-c", FIRST_ARRAY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the control register is x86-64's")
def test_denormals_are_zero_in_every_thread_of_paddle() -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", DENORMALS], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(512 * 512)] * 2 + ["0"] * 2


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "tpu", "cpu:0", "gpu:", "gpu:-1", "gpu:one", "GPU", "cuda"])
def test_a_device_of_another_kind_is_refused(paddle: Any, name: str) -> None:
    with pytest.raises(sft.UsageError, match=r"There is no device .*; give cpu, gpu or gpu:N"):
        runtime.use_device(name)


def test_a_gpu_that_is_not_there_is_refused(paddle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(paddle.device, "set_device", chosen.append)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(sft.UsageError, match="Device gpu is not there: the PaddlePaddle that is installed"):
        runtime.use_device("gpu")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    with pytest.raises(sft.UsageError, match="Device gpu:2 is not there: this machine has 2 GPUs"):
        runtime.use_device("gpu:2")
    assert chosen == []
    for name in ("gpu", "gpu:1", "cpu"):
        runtime.use_device(name)
    assert chosen == ["gpu", "gpu:1", "cpu"]


def test_one_thread_that_was_asked_for_in_python_is_said_to_be_taken_for_paddles_own() -> None:
    """Imported paddle sets the same value where nobody has set any, so the two cannot be told apart."""
    script = (
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport paddle\nfrom sft import runtime\n"
        "runtime.physical_cores = lambda: 3\nprint(runtime.prepare())\n"
        "from sft import arithmetic\nprint(arithmetic.in_effect()['OMP_THREAD_LIMIT'])"
    )
    environ = {name: value for name, value in os.environ.items() if name not in runtime.VARIABLES}
    environ["OMP_THREAD_LIMIT"] = "2"
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    line, limit = done.stdout.splitlines()[-2:]
    assert "OMP_NUM_THREADS=3" in line
    assert line.endswith("for one thread set it before Python starts")
    assert limit == "2"
