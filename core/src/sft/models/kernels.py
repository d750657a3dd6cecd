"""How the pieces of a model are computed: what a plugin gives for ``sft_kernels``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional as F

from sft.models.dense_attention import dense_attention, dense_mask
from sft.models.document_attention import Documents, document_attention, documents_of, rows_of
from sft.models.kept_keys import KeptKeys
from sft.models.norms import rms_norm
from sft.models.rotary import Rotary
from sft.models.sums import row_sums
from sft.models.turning import rotate


class _Mask:
    """Where the documents of a batch end, in the forms that attention wants, each made when it is first asked for."""

    def __init__(self, ends: np.ndarray | None) -> None:
        self._ends = ends
        self._documents: Documents | None = None

    @cached_property
    def dense(self) -> Any | None:
        return None if self._ends is None else dense_mask(self._ends)

    def documents(self, rows: int, length: int) -> Documents | None:
        """None where ends say more than documents and windows."""
        if self._documents is None:
            self._documents = rows_of(rows, length) if self._ends is None else documents_of(self._ends)
        return self._documents


class Kernels:
    """The pieces of a model as paddle's own operations compute them. A subclass computes some of them otherwise, to the
    same values, and leaves what it cannot do to these.

    Each method that takes part in the forward pass is one differentiable step: gradients flow to the arguments that are
    not ``stop_gradient``. Weights lie [in, out], as everywhere in paddle.

    Attributes:
        narrow: Whether products round their factors to 16 bits, whatever they are held in.
        skips_masked: Whether time and memory of :meth:`attention` follow what is seen, and not the square of a row's
            length. (Here they do but for 16 bits on a GPU, for which there are plugins.)
        arithmetic: What the last bits of the results depend on beside device, threads and precision, by a name for
            ``run.json``; a resumed run says where it differs.
    """

    narrow = False
    skips_masked = True
    arithmetic: Mapping[str, str] = MappingProxyType({})
    _made: tuple[weakref.ref[Any], int, tuple[Callable[..., Any], tuple[Any, ...]]] | None = None

    def rms_norm(self, x: Any, weight: Any, epsilon: float, offset: float) -> Any:
        """(``offset`` + weight) · x / √(mean(x²) + ``epsilon``): x [..., hidden] of any float type, weight [hidden] →
        like x, in the weight's type."""
        return rms_norm(x, weight, epsilon, offset)

    def rotate(self, x: Any, rotary: Rotary, cosines: Any, sines: Any) -> Any:
        """x [B, S, heads, D], turned in its first ``rotary.size`` dimensions by tables float32 [B, S, 1, size], as
        :func:`sft.models.turning.tables` makes them."""
        return rotate(x, rotary, cosines, sines)

    def mask(self, ends: np.ndarray | None) -> Any:
        """What :meth:`attention` is to know of a batch, made once for all layers; ``ends`` int32 [B, 1, S, 1] or None,
        as :class:`sft.AttentionBackend` has it."""
        return _Mask(ends)

    def attention(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None) -> Any:
        """softmax(Q Kᵀ / √D) V over the keys that ``mask``, which is what :meth:`mask` gave, lets a query see: query
        [B, S, H, D]; key, value [B, S, K, D], where K divides H → [B, S, H, D]. With ``cap``, scaled scores s become
        cap · tanh(s / cap) before the mask."""
        fused = cap is None and query.place.is_gpu_place() and query.dtype in (paddle.float16, paddle.bfloat16)
        documents = None if fused else mask.documents(*query.shape[:2])
        if documents is None:
            return dense_attention(query, key, value, mask.dense, cap)
        return document_attention(query, key, value, documents, cap)

    def kept_keys(self, key: Any, value: Any) -> KeptKeys:
        """What an answer keeps of a layer's keys and values, with the attention of each token that is added: key, value
        [B, S, K, D] of the prompts."""
        return KeptKeys(key, value)

    def swiglu(self, gate: Any, up: Any) -> Any:
        """silu(gate) · up, of equal shapes (arXiv 2002.05202)."""
        return F.swiglu(gate, up)

    def geglu(self, gate: Any, up: Any) -> Any:
        """gelu(gate) · up, of equal shapes, GELU in its tanh form."""
        return F.gelu(gate, approximate=True) * up

    def linear(self, x: Any, weight: Any, bias: Any | None = None, transposed: bool = False) -> Any:
        """x · W + b: x [..., in], W [in, out] ([out, in] where ``transposed``), b [out] or None → [..., out]."""
        if transposed or bias is None:  # while answers are computed, what F.linear asks first takes half its time
            return paddle.matmul(x, weight, transpose_y=transposed)
        return F.linear(x, weight, bias)

    def low_rank_linear(self, x: Any, weight: Any, bias: Any | None, a: Any, b: Any, scaling: float) -> Any:
        """x · W + bias + ``scaling`` · (x · A) · B: W [in, out] frozen, A [in, r], B [r, out] (arXiv 2106.09685)."""
        return self.linear(x, weight, bias) + paddle.matmul(paddle.matmul(x, a) * scaling, b)

    def answering(self) -> AbstractContextManager[None]:
        """What answers are computed in: the same matrices meet a few rows again and again, and no gradients flow."""
        return nullcontext()

    def product(self, x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
        """x · y of two matrices, for steps that write their gradients themselves: none flow through it."""
        return paddle.matmul(x, y, transpose_x=transpose_x, transpose_y=transpose_y)

    def kept(self, x: Any) -> Any:
        """What a step that writes its gradient itself keeps of ``x`` until backward: ``x``, or less of it. No gradients
        flow through it."""
        return x

    def restored(self, kept: Any) -> Any:
        """``x`` again, as exactly as :meth:`kept` kept it."""
        return kept

    def remember(self, y: Any, again: Callable[..., Any], *kept: Any) -> None:
        """What a step tells of ``y``, which it has made: it is ``again(*kept)`` too, of tensors that its own backward
        keeps anyway."""
        # Weak, as a tensor would keep its whole graph.
        self._made = weakref.ref(y), y.inplace_version, (again, kept)

    def remembered(self, x: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        """``again`` and ``kept`` of ``x``, where :meth:`remember` was told of it last, and nobody has changed it since:
        a step that takes ``x`` may keep those instead. (Here none does.)"""
        made = self._made
        return made[2] if made is not None and made[1] == x.inplace_version and made[0]() is x else None

    def cross_entropy(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Logits float32 [n, V] and labels int64 [n] → the losses −log softmax(logits)[label], float64 [n, 1], and the
        probabilities softmax(logits), float32 [n, V], of which the caller may change the values; no gradients flow.
        They may take the place of the logits, which are the caller's no more."""
        logits = logits - logits.max(axis=-1, keepdim=True)
        exponentials = logits.exp()
        normaliser = row_sums(exponentials)
        chosen = paddle.take_along_axis(logits, labels.unsqueeze(-1), axis=-1)
        losses = normaliser.astype("float64").log() - chosen.astype("float64")
        return losses, exponentials / normaliser

    def four_bits(self, codes: Any, values: Any, scales: Any, size: int) -> Any | None:
        """values[code] · scale, float32 [blocks · size], of codes of 4 bits: uint8 [blocks · size / 2], two in a byte,
        the first in its high half; values float32 [16]; scales float32, one for each ``size`` codes. None where
        whoever holds the codes has the better way. (Here always.)"""
        return None


PLAIN = Kernels()
"""What every layer begins with."""


class Linear(paddle.nn.Linear):
    """A Linear of the decoder: paddle's, computed by the model's kernels.

    Attributes:
        narrows: Whether its ``weight`` may be held in 16 bits in a model that is float32: what computes with it takes
            both. Other layers that say so have a ``weight`` of which the same is true.
    """

    kernels = PLAIN
    narrows = True

    def forward(self, x: Any) -> Any:
        return self.kernels.linear(x, self.weight, self.bias)


def use_kernels(model: Any, kernels: Kernels) -> None:
    """Let ``kernels`` compute ``model``: every layer in it that has an attribute ``kernels``, and its attention."""
    for part in (*model.sublayers(include_self=True), model.attention):
        if hasattr(part, "kernels"):
            part.kernels = kernels
