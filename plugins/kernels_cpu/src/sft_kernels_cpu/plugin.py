"""Plugin ``fast-cpu``: the pieces of a model in native code, in every run on a CPU."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    from sft import Kernels, Precision, Run


class FastCpu(sft.Plugin):
    """RMSNorm, rotary embedding, attention, SwiGLU, GEGLU, LoRA's Linear and the softmax of the loss as single native
    steps, and of answers the products of few rows and the attention of single tokens, equal to paddle's operations to
    rounding. On another device, and where there is no native code, the core's own."""

    name = "fast-cpu"
    api_version = 1
    summary = "Native code for the pieces of a model on a CPU."

    @sft.hookimpl
    def sft_kernels(self, run: Run | None, precision: Precision) -> Kernels | None:
        import paddle

        from sft_kernels_cpu.library import native

        if not paddle.device.get_device().startswith("cpu"):
            return None
        library = native()
        if isinstance(library, str):
            say = _to_standard_error if run is None else run.say
            say(f"fast-cpu: paddle's own operations compute, as the native code is not usable: {library}")
            return None
        from sft_kernels_cpu.kernels import NativeKernels

        return NativeKernels(library, sft.own_kernels(precision))

    @sft.hookimpl(optionalhook=True)
    def parallel_outline(self, outline: object) -> None:
        """Changes nothing: it computes the same pieces and keeps no more of them for backward."""


@cache
def _to_standard_error(text: str) -> None:
    """Once in a process: outside a run nobody hands on what a plugin says."""
    print(text, file=sys.stderr)
