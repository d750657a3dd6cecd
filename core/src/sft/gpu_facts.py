"""What decides how a GPU computes, for ``run.json`` and for the table of ``make test-gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/version")
FLAGS = ("FLAGS_flash_attn_version", "FLAGS_cudnn_deterministic")


def gpu_facts() -> dict[str, Any]:
    """The GPU that paddle computes on, how many there are, driver, libraries, and paddle's flags of attention; empty on
    a CPU."""
    import paddle

    device = str(paddle.device.get_device())
    if not device.startswith("gpu"):
        return {}
    cuda = paddle.device.cuda
    major, minor = cuda.get_device_capability()
    return {
        "name": str(cuda.get_device_name()),
        "compute_capability": f"{major}.{minor}",
        "count": int(cuda.device_count()),
        "driver": driver(),
        "cuda": str(paddle.version.cuda()),
        "cudnn": str(paddle.version.cudnn()),
        "nccl": str(paddle.version.nccl()),
        "flags": dict(paddle.get_flags(list(FLAGS))),
    }


def driver() -> str:
    """The version of NVIDIA's kernel module; "unknown" where the system does not say it."""
    try:
        return DRIVER.read_text(encoding="utf-8").split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"
