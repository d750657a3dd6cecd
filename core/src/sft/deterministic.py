"""Setting ``deterministic``: on a GPU the same run gives the same bits again, which on a CPU it does anyway.
``strict`` also refuses what is known to give others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from sft.errors import UsageError
from sft.runtime import computed_before

VARIABLES = {
    "NVIDIA_TF32_OVERRIDE": "0",  # cuBLAS keeps all bits of float32 factors
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # and divides sums alike whatever else the GPU does
    "NCCL_ALGO": "Ring",  # sums over processes have one order
}
"""What CUDA's libraries read when they are loaded. Values that the user set win."""
FLAGS = {
    "FLAGS_cudnn_deterministic": True,  # attention's backward is one of several kernels that add in any order otherwise
    "FLAGS_embedding_deterministic": 1,  # so does the embedding's
    "FLAGS_cudnn_exhaustive_search": False,  # which takes the algorithm that happened to be the fastest
}
"""Of paddle's builds with CUDA; others have none of them."""


@contextlib.contextmanager
def repeatable(wanted: bool | str) -> Iterator[None]:
    """Within it, if ``wanted``, what decides on a GPU about the order of sums is set; afterwards it is as it was. Begin
    before paddle is imported, and call :func:`switch_on` when it is."""
    if not wanted:
        yield
        return
    variables = {name: os.environ.get(name) for name in VARIABLES}
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, before in variables.items():
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
        if _before:
            _set(_before)
            _before.clear()


_before: dict[str, Any] = {}
"""The flags before :func:`switch_on` set them."""


def switch_on(arithmetic: Mapping[str, Any], strict: bool = False) -> None:
    """Set paddle's flags. Raises :class:`UsageError` where ``arithmetic`` (:func:`sft.arithmetic.in_effect`) leaves the
    number of threads open, and with it the order of sums on a CPU; where ``strict``, also where this process computes
    otherwise than the command line."""
    _before.update(flags_in_effect())
    _set(FLAGS)
    if arithmetic["device"] == "cpu" and arithmetic["dynamic_threads"]:
        raise UsageError(
            "deterministic: OpenMP may choose another number of threads for each sum; unset OMP_DYNAMIC, or leave "
            "deterministic out."
        )
    if strict and computed_before():
        raise UsageError(
            "deterministic strict: paddle has multiplied matrices in this process before sft was set up, so this run "
            "would compute otherwise than the command line; begin the program with import sft; sft.prepare()."
        )


def flags_in_effect() -> dict[str, Any]:
    """Those of :data:`FLAGS` that this build of paddle has."""
    import paddle

    known = [name for name in FLAGS if name in paddle.base.core.globals()]
    return dict(paddle.get_flags(known)) if known else {}


def _set(flags: Mapping[str, Any]) -> None:
    import paddle

    known = {name: value for name, value in flags.items() if name in paddle.base.core.globals()}
    if known:
        paddle.set_flags(known)
