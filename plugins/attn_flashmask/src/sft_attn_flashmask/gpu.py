"""What paddle's FlashAttention kernels can do on this GPU, and which version of them computes.

Version 2 is the default of Paddle 3.3. Version 3 is written for Hopper (9.0); whether a build has it, only a try says.
**Nobody has run this on a GPU yet.** Therefore version 3 proves itself: rows as a run has them are computed both
ways, forward and backward, and if it raises or differs by more than 16-bit rounding, version 2 stays, and a line says
so. Where sums must have one order (setting ``deterministic``) paddle takes version 2 for rows without a mask, and for
wide heads, whatever its flag says: there is nothing to compare then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

FLAG = "FLAGS_flash_attn_version"
ONE_ORDER = "FLAGS_cudnn_deterministic"
HOPPER = 90
WIDEST = 256
WIDEST_BACKWARD = 192
"""The widest heads whose backward fits into the shared memory of every GPU from 8.0 on."""
LARGE = (80, 90, 100)
"""Compute capabilities with shared memory for the backward of heads up to WIDEST."""
WIDEST_IN_ORDER = 128
"""The widest heads that version 3 of FlashMask computes where sums must have one order."""
CLOSE = 2e-2
"""How far two 16-bit results may be apart, relative to their size: bfloat16 rounds by up to 4e-3, several times."""


def on_gpu() -> bool:
    import paddle

    return str(paddle.device.get_device()).startswith("gpu")


def capability() -> int:
    """The GPU's compute capability, 80 for 8.0."""
    import paddle

    major, minor = paddle.device.cuda.get_device_capability()
    return 10 * int(major) + int(minor)


def missing(dtype: str, head_size: int | None, cap: float | None) -> str | None:
    """Why paddle's kernels cannot compute the attention of a model on this GPU; None where they can.

    ``dtype`` is that of the run's products; ``head_size`` None where the model does not say.
    """
    found = capability()
    if dtype not in ("bfloat16", "float16"):
        return f"paddle's kernels compute in 16 bits, and this run in {dtype}"
    if cap is not None:
        return "paddle's kernels know no cap of attention scores, which this model has"
    if found < 80:
        return f"paddle's kernels need a GPU of compute capability 8.0, and this one has {found / 10}"
    if head_size is None:
        return None
    if head_size % 8 or head_size > WIDEST or (head_size > WIDEST_BACKWARD and found not in LARGE):
        return f"paddle's kernels have none for heads of {head_size} on a GPU of compute capability {found / 10}"
    return None


class Version:
    """Which version computes heads of one kind; it is found at the first use. ``say`` receives a line where it is not
    version 2."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._third: dict[tuple[str, int, bool, bool], bool] = {}

    @contextlib.contextmanager
    def chosen(self, query: Any, masked: bool) -> Iterator[None]:
        """A context in which paddle computes ``query`` [B, S, H, D], with a mask or without one, by the version that is
        best for it."""
        if FLAG in os.environ or capability() != HOPPER:  # the user's choice, or the only one
            yield
            return
        dtype, size = str(query.dtype).rpartition(".")[2], int(query.shape[-1])
        kind = dtype, size, masked, in_one_order()
        if kind not in self._third:
            failure = compare(dtype, size, masked)
            self._third[kind] = failure is None
            how = "by version 3 of FlashAttention" if failure is None else f"by version 2, as version 3 {failure}"
            rows = "with a mask" if masked else "without a mask"
            self._say(f"attention: {dtype} heads of {size} {rows} are computed {how}")
        with _version(3 if self._third[kind] else 2):
            yield


@contextlib.contextmanager
def _version(number: int) -> Iterator[None]:
    import paddle

    before = paddle.get_flags([FLAG])
    paddle.set_flags({FLAG: number})
    try:
        yield
    finally:
        paddle.set_flags(before)


def in_one_order() -> bool:
    """Whether sums must have one order: setting ``deterministic``."""
    import paddle

    return bool(paddle.get_flags([ONE_ORDER])[ONE_ORDER])


def compute(query: Any, key: Any, value: Any, indices: Any | None) -> Any:
    """paddle's kernel: causal, by documents where there are ``indices`` int32 [B, 1, S, 1]."""
    from paddle.nn.functional import flashmask_attention
    from paddle.nn.functional.flash_attention import flash_attention

    if indices is None:
        return flash_attention(query, key, value, causal=True)[0]
    return flashmask_attention(query, key, value, startend_row_indices=indices, causal=True)


def compare(dtype: str, size: int, masked: bool) -> str | None:
    """What is wrong with version 3, if anything is: for heads of ``size``, four of queries for two of keys, in a row of
    one document, or where ``masked`` of three."""
    import numpy as np
    import paddle

    if in_one_order() and (not masked or size > WIDEST_IN_ORDER):
        return "adds in no fixed order there, and deterministic asks for one"
    random = np.random.default_rng(0)
    given = [random.standard_normal((1, 300, heads, size), np.float32) for heads in (4, 2, 2, 4)]
    ends = np.repeat([130, 131, 300], [130, 1, 169]).astype(np.int32).reshape(1, 1, -1, 1)
    indices = paddle.to_tensor(ends) if masked else None
    try:
        results = []
        for version in (2, 3):
            q, k, v, slope = (paddle.to_tensor(array).astype(dtype).detach() for array in given)
            for tensor in (q, k, v):
                tensor.stop_gradient = False
            with _version(version), paddle.amp.auto_cast(enable=False), paddle.enable_grad():
                y = compute(q, k, v, indices)
                (y * slope).sum().backward()
            results.append([tensor.astype("float32") for tensor in (y, q.grad, k.grad, v.grad)])
        apart = max(float((one - other).norm() / one.norm()) for one, other in zip(*results, strict=True))
        if not apart <= CLOSE:
            return f"differs by {apart:.2g}"
    except Exception as error:  # whatever a GPU or its library may raise
        return f"fails ({(str(error).strip() or type(error).__name__).splitlines()[-1]})"
    return None
