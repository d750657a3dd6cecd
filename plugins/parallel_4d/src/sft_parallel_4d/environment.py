"""What a launcher tells this process by its environment: whether there are others, and which of them it is."""

from __future__ import annotations

import functools
import os

from sft_parallel_4d.options import ParallelOptions

FOLDER = "SFT_LAUNCH_DIR"
"""Where ``--nproc`` started this process: the environment variable with the folder of that launch."""


def processes(options: ParallelOptions, device: str | None) -> int:
    """How many processes share the run: as the launcher says, or as one is going to be asked for, to compute on
    ``device`` (setting ``device``)."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or asked_for(options, device))


def asked_for(options: ParallelOptions, device: str | None) -> int:
    """How many processes ``nproc`` asks for: with ``auto`` one on each GPU that paddle sees, and one where it sees none
    or is to compute on CPUs."""
    if options.nproc != "auto":
        return int(options.nproc)
    return 1 if device == "cpu" else _gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))


@functools.cache
def _gpus(visible: str | None) -> int:
    """Of those that are ``visible``, as the environment says."""
    import paddle  # no run asks but those on GPUs

    return max(1, paddle.device.cuda.device_count()) if paddle.is_compiled_with_cuda() else 1


def gpu_memory() -> int:
    """Bytes of the GPU that this process computes on; 0 on CPUs."""
    import paddle  # a run has it by then

    if not paddle.device.get_device().startswith("gpu"):
        return 0
    return int(paddle.device.cuda.get_device_properties().total_memory)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0)


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return bool(os.environ.get("PADDLE_TRAINERS_NUM"))
