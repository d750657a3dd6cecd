"""Which kernels compute a model where no plugin provides any."""

from __future__ import annotations

import paddle

from sft.models.gpu_kernels import GpuKernels
from sft.models.kernels import PLAIN, Kernels
from sft.models.onednn import onednn
from sft.models.sixteen_bits import SixteenBits
from sft.precision import Precision


def own_kernels(precision: Precision) -> Kernels:
    """The core's kernels for the device that paddle uses now, and for ``precision``. A plugin's kernels leave to them
    what they do not compute: they take what is held in 16 bits."""
    if paddle.device.get_device().startswith("gpu"):
        return GpuKernels()
    return SixteenBits(onednn()) if precision.dtype == "bfloat16" else PLAIN
