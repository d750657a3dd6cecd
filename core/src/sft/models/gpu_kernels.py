"""A model's pieces on a GPU: paddle's fused operations, where paddle has one that computes the same.

Their signatures, types and gradients are those of Paddle 3.3. On a CPU they have no kernels, and nobody has run them on
a GPU yet: ``make test-gpu`` compares each with the plain operations.
"""

from __future__ import annotations

from typing import Any

import paddle

from sft.models.kernels import Kernels
from sft.models.rotary import Rotary
from sft.precision import no_casts


class GpuKernels(Kernels):
    """RMSNorm, rotary embedding and softmax cross-entropy in one kernel each; SwiGLU is one already."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[Any, Any, Any]] = {}

    def rms_norm(self, x: Any, weight: Any, epsilon: float, offset: float) -> Any:
        if x.dtype == weight.dtype != paddle.float32 and not offset:
            return _rms_norm(x, weight, epsilon)
        # The kernel wants one type, and 1 + w would lose w's last bits in 16 of them.
        with no_casts():
            wide = weight.astype("float32")
            return _rms_norm(x.astype("float32"), wide + offset if offset else wide, epsilon).astype(weight.dtype)

    def rotate(self, x: Any, rotary: Rotary, cosines: Any, sines: Any) -> Any:
        turning = x if rotary.size == x.shape[-1] else x[..., : rotary.size]
        rows, length, heads, size = turning.shape
        cosines, sines = self._unsigned(rotary, cosines, sines)
        with no_casts():  # automatic casts would round angles' cosines to 16 bits
            turned = paddle.incubate.nn.functional.fused_rotary_position_embedding(
                turning.astype("float32").reshape([1, rows * length, heads, size]),
                sin=sines,
                cos=cosines,
                use_neox_rotary_style=rotary.interleaved,
            )[0]
            turned = turned.reshape([rows, length, heads, size]).astype(x.dtype)
        return turned if turning is x else paddle.concat([turned, x[..., rotary.size :]], axis=-1)

    def _unsigned(self, rotary: Rotary, cosines: Any, sines: Any) -> tuple[Any, Any]:
        """Tables [1, B·S, 1, size] as the kernel wants them: it takes one row, and gives the first sine of a pair its
        sign itself. All layers of a batch share them, and so do queries and keys."""
        known = self._tables.get(id(sines))
        if known is None or known[0] is not sines:
            with paddle.no_grad():
                if rotary.interleaved:
                    second = sines.reshape([0, 0, 0, -1, 2])[..., 1:].tile([1, 1, 1, 1, 2])
                else:
                    second = sines[..., rotary.size // 2 :].tile([1, 1, 1, 2])
                shape = [1, sines.shape[0] * sines.shape[1], 1, rotary.size]
                known = (sines, cosines.reshape(shape), second.reshape(shape))
            while len(self._tables) >= KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[id(sines)] = known
        return known[1:]

    def cross_entropy(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        with no_casts():
            probabilities, losses = paddle._C_ops.cross_entropy_with_softmax(
                logits, labels.unsqueeze(-1), False, True, True, -100, -1
            )
        return losses.astype("float64"), probabilities


KEPT = 4
"""Tables that are kept: a model has one or two kinds of rotary embedding, and two batches may be under way."""


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return paddle.nn.functional.rms_norm(x, [x.shape[-1]], weight, epsilon)[0]
