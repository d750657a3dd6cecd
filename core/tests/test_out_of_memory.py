"""A run that gets no memory: one sentence with a cure, and what it had saved stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_plugins import plugin, raising, toy

import sft
from sft.files import read_report
from sft.tensor_files import read_tensors
from sft.training import out_of_memory

Train = Callable[..., sft.Summary]

OF_A_CPU = """

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
ResourceExhaustedError: Fail to alloc memory of 1073741824 size, error code is 12.
  [Hint: Expected error == 0, but received error:12 != 0:0.] (at /paddle/paddle/phi/core/memory/cpu_allocator.cc:44)
"""
OF_A_GPU = """(ResourceExhausted)

Out of memory error on GPU 0. Cannot allocate 2.000000GB memory on GPU 0, 78.500000GB memory has been allocated and \
available memory is only 600.000000MB.

Please check whether there is any other process using GPU 0.
1. If yes, please stop them, or start PaddlePaddle on another GPU.
 (at ../paddle/phi/core/memory/allocation/cuda_allocator.cc:86)"""


@pytest.fixture
def without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no plugin is installed that has any."""
    monkeypatch.setattr("sft.training.memory.requests", lambda kind: {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no memory is left"),
        ("Unable to allocate 8.00 GiB for an array", "Unable to allocate 8.00 GiB for an array"),
        (OF_A_CPU, "Fail to alloc memory of 1073741824 size, error code is 12"),
        (OF_A_GPU, "Out of memory error on GPU 0. Cannot allocate 2.000000GB memory on GPU 0, 78.500000GB memory has "
         "been allocated and available memory is only 600.000000MB"),
    ],
)  # fmt: skip
def test_what_paddle_says_is_one_line(text: str, said: str) -> None:
    assert out_of_memory.said(MemoryError(text)) == said


@pytest.mark.usefixtures("without_advice")
def test_a_run_says_what_needs_less_and_keeps_its_checkpoint(train: Train, tmp_path: Path) -> None:
    full = toy("full", sft_checkpoint_saved=raising(MemoryError(OF_A_CPU)))
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    message = (
        r"^Out of memory after step 2 \(Fail to alloc memory of 1073741824 size, error code is 12\): a smaller "
        r"per_device_train_batch_size \(4\) with more gradient_accumulation_steps, --recompute true or a smaller "
        r"max_length \(2048\) needs less; then resume from .*checkpoint-2\.$"
    )
    with pytest.raises(sft.SftError, match=message):
        train("out", (full,), **settings)
    assert read_report(tmp_path / "out")["status"] == "failed"
    train("out", resume_from_checkpoint="auto", **settings)
    train("whole", **settings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_before_the_first_step(train: Train, tmp_path: Path) -> None:
    for hook in ("sft_adapt_model", "sft_run_started"):
        with pytest.raises(
            sft.SftError, match=r"^Out of memory (before the first step|after step 0) \(no memory is left"
        ):
            train("out", (toy("full", **{hook: raising(MemoryError())}),), recompute=True)


@pytest.mark.usefixtures("without_advice")
def test_advice_comes_from_plugins_that_are_not_active(
    train: Train, distribute: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """@sft.hookimpl
        def sft_memory_advice(self, values, device, memory):
            assert memory > 2**20 and device == "cpu"
            return f"with {values['per_device_train_batch_size'] // 2} rows it fits"
    """
    monkeypatch.setattr("sft.training.memory.requests", lambda kind: {"memory": ["adviser"]})
    distribute("toy-adviser", plugin("adviser", body), {"adviser": "Tool"}, requests={"advice.memory": "Tool"})
    full = toy("full", sft_run_started=raising(MemoryError()))
    with pytest.raises(sft.SftError, match=r"\(no memory is left\): .*with 4 rows it fits"):
        train("out", (full,), per_device_train_batch_size=8)


def test_a_file_that_memory_has_no_room_for_is_not_called_damaged(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", lambda *arguments, **more: raising(MemoryError("no room"))(None))
    with pytest.raises(MemoryError):
        read_tensors(models / "llama-tied-gqa" / "model.safetensors")


def test_a_command_that_is_out_of_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.commands import cli

    monkeypatch.setattr(cli.cli, "main", lambda **more: raising(MemoryError(OF_A_CPU))(None))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "sft: Out of memory (Fail to alloc memory of 1073741824 size, error code is 12): take a smaller model, or "
        "smaller batches.\n"
    )


REAL = """
import resource, sys
from pathlib import Path
import sft

class Full(sft.Plugin):
    '''Leaves this process the memory that it has.'''
    name = "full"
    api_version = 1

    @sft.hookimpl
    def sft_checkpoint_saved(self, run, folder):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        import paddle
        held.append(paddle.zeros([1 << 28]))

held = []
try:
    sft.run({"model_name_or_path": sys.argv[1], "dataset_name_or_path": sys.argv[2], "output_dir": sys.argv[3],
             "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "do_eval": False}, plugins=[Full])
except sft.SftError as error:
    print("said:", error)
"""


@pytest.mark.slow
def test_the_real_thing(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", REAL, str(base_model), str(dataset), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert said.startswith("said: Out of memory after step 1 (")
    assert said.endswith("checkpoint-1.")
    assert "Traceback" not in done.stderr
