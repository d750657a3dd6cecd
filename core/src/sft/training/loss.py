"""Cross-entropy of target positions alone, or what token losses make of it, through lm_head in chunks: logits [B, S, V]
never exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from sft.data.encoded import IGNORED
from sft.distributed.meeting import Vocabulary
from sft.models.beside import HeadLayer
from sft.models.forward import hidden_states
from sft.models.kernels import PLAIN, Kernels
from sft.models.sums import row_sums
from sft.precision import no_casts, product_dtype
from sft.seams import Batch
from sft.training.head_update import Update
from sft.training.token_losses import Slopes, TokenLosses

CHUNK_BYTES = 24 << 20
"""Size of one chunk of float32 logits on a CPU; bounds the memory of the loss whatever the batch. What is larger than
32 MiB the system takes back each time, and its pages are new again: a fifth more time for 64 MiB."""
GPU_LEAST = 64 << 20
GPU_CHUNK_BYTES = 1 << 30
"""The most on a GPU: each chunk reads lm_head twice, which has to be worth it."""
GPU_SHARE = 64
"""What part of a GPU's memory a chunk is otherwise; three such arrays exist at a time. It is all of its memory that
counts, not what is free at a moment, so that a run's sums always have the same order."""


def _apart(lm_head: Any, hidden: Any) -> tuple[Any, Update | None]:
    """The layer that has the matrix, and what an adapter in its place has beside the products of ``hidden`` with it."""
    if not isinstance(lm_head, HeadLayer):
        return lm_head, None
    base, kernels = lm_head.base, _Shape.of(lm_head.base).kernels
    columns = int(base.weight.shape[0 if base.transpose_y else 1])
    return base, Update(lm_head.beside(hidden), columns, _vocabulary(base), kernels)


def _vocabulary(lm_head: Any) -> Vocabulary:
    return getattr(lm_head, "vocabulary", None) or Vocabulary()


def _place(label: Any, columns: int, vocabulary: Vocabulary) -> tuple[Any, Any]:
    """The column [n, 1] of each label here, and 1.0 [n, 1] where it is here (else 0.0, and any column)."""
    label = label.unsqueeze(-1)
    if vocabulary.start is None:
        return label, paddle.ones(label.shape, "float32")
    column = label - vocabulary.start
    here = ((column >= 0) & (column < columns)).astype("float32")
    return column.clip(0, columns - 1), here


@dataclass(frozen=True)
class _Counts:
    """What each position counts: in the loss as ``losses`` says, float64 [n, 1], and in gradients as ``gradients``,
    float32 [n, 1], have it with the ``factor`` before they are rounded to 16 bits. None where all count 1."""

    factor: float
    losses: Any | None = None
    gradients: Any | None = None

    @classmethod
    def of(cls, labels: np.ndarray, weights: np.ndarray | None, factor: float, place: Any) -> _Counts:
        if weights is None:
            return cls(factor)
        each = weights[labels != IGNORED].astype(np.float64)[:, None]
        # On the host and in float64: a weight, or the factor alone, may be what 16 bits and their scale do not hold.
        return cls(factor, paddle.to_tensor(each, place=place), paddle.to_tensor(each * factor, "float32", place=place))

    def weighted(self, losses: Any, part: slice) -> Any:
        """Losses float64 [n, 1] of some positions, as they count."""
        return losses if self.losses is None else losses * self.losses[part]

    def scaled(self, difference: Any, part: slice) -> Any:
        """Their gradients float32 [n, V], as they count; they may take the place of ``difference``."""
        if self.gradients is not None:
            with no_casts():
                return difference.multiply_(self.gradients[part])
        return difference if self.factor == 1.0 else difference.scale_(self.factor)


@dataclass(frozen=True)
class _Shape:
    """How products with lm_head are computed and become logits: cap · tanh(scale · product / cap), or scale · product
    without a cap."""

    transpose_y: bool
    scale: float
    cap: float | None
    kernels: Kernels

    @classmethod
    def of(cls, lm_head: Any) -> _Shape:
        transposed, cap = bool(getattr(lm_head, "transpose_y", False)), getattr(lm_head, "cap", None)
        return cls(transposed, getattr(lm_head, "scale", 1.0), cap, getattr(lm_head, "kernels", PLAIN))

    def logits(self, part: Any, weight: Any, update: Update | None, here: slice) -> Any:
        logits = self.kernels.product(part, weight, transpose_y=self.transpose_y).astype("float32")
        logits = logits if update is None else update.onto(logits, here)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else paddle.tanh(logits / self.cap) * self.cap

    def slope(self, gradient: Any, capped: Any) -> Any:
        """The gradient of the products, from that of the logits; ``capped`` are the logits, if there is a cap."""
        if self.cap is not None:
            gradient = gradient.multiply_((capped / self.cap).square_().scale_(-1.0, 1.0))
        return gradient if self.scale == 1.0 else gradient * self.scale


def _read(weight: Any, hidden: Any, kernels: Kernels) -> Any:
    """The matrix as products with ``hidden`` read it: rounded once for all chunks, where they round it."""
    if kernels.narrow:
        return kernels.kept(weight)
    dtype = product_dtype(hidden)
    return weight.astype(dtype) if weight.dtype == paddle.float32 != dtype else weight


def _losses(logits: Any, label: Any, shape: _Shape, vocabulary: Vocabulary) -> tuple[Any, Any]:
    """Of logits float32 [n, columns that are here] the losses, float64 [n, 1], and the probabilities, float32
    [n, columns], which may take the logits' place."""
    if vocabulary.start is None:
        return shape.kernels.cross_entropy(logits, label)
    lower = logits - vocabulary.maximum(logits.max(axis=-1, keepdim=True))
    exponentials = lower.exp()
    normaliser = vocabulary.total(row_sums(exponentials))
    column, here = _place(label, logits.shape[-1], vocabulary)
    chosen = vocabulary.total(paddle.take_along_axis(lower, column, axis=-1) * here)
    return normaliser.astype("float64").log() - chosen.astype("float64"), exponentials / normaliser


def _other_losses(
    logits: Any, label: Any, shape: _Shape, vocabulary: Vocabulary, other: TokenLosses, columns: int, learns: bool
) -> tuple[Any, Any, Slopes | None]:
    """:func:`_losses` as token losses change them, and the slopes of these; ``columns`` are those of all processes."""
    column, here = _place(label, logits.shape[-1], vocabulary)
    with no_casts():
        chosen = vocabulary.total(paddle.take_along_axis(logits, column, axis=-1) * here).astype("float64")
        mean = vocabulary.total(row_sums(logits)).astype("float64") / columns
    losses, probabilities = _losses(logits, label, shape, vocabulary)
    losses, slopes = other(label.unsqueeze(-1), losses, losses + chosen, mean, columns, learns)
    return losses, probabilities, slopes


def _difference(probabilities: Any, label: Any, vocabulary: Vocabulary, slopes: Slopes | None) -> Any:
    """The gradient of losses in the logits that are here, float32 [n, columns]; it takes the probabilities' place."""
    one: Any = 1.0
    if vocabulary.start is not None:
        label, one = (column.squeeze(-1) for column in _place(label, probabilities.shape[-1], vocabulary))
    if slopes is None:
        return _added(probabilities, label, -one)
    with no_casts():
        scaled = probabilities.multiply_(slopes.probabilities).add_(slopes.every)
        return _added(scaled, label, slopes.label.squeeze(-1) * one)


def _added(x: Any, label: Any, value: Any) -> Any:
    """x [n, columns] with ``value``, [n] or a number, more at the ``label`` [n] of each row; it changes. (Paddle's
    ``put_along_axis_`` that adds, and ``take_along_axis``, go through all of x.)"""
    places = paddle.arange(x.shape[0]), label
    return x.index_put_(places, paddle.gather_nd(x, paddle.stack(places, axis=-1)) + value)


def _columns(weight: Any, transpose_y: bool, vocabulary: Vocabulary) -> int:
    """How many columns the logits have in all processes together, which ask each other if nobody knows."""
    columns = int(weight.shape[0 if transpose_y else 1])
    if vocabulary.start is None or vocabulary.size:
        return vocabulary.size or columns
    return int(vocabulary.total(paddle.to_tensor([float(columns)])))


def _rows(weight: Any, transpose_y: bool, vocabulary: Vocabulary) -> int:
    """How many positions a chunk has: as many in each process that has a part of the columns, since they meet in it."""
    columns = vocabulary.widest or (weight.shape[0] if transpose_y else weight.shape[1])
    return max(1, chunk_bytes(None if weight.place.is_cpu_place() else _gpu_memory()) // (4 * columns))


def chunk_bytes(gpu_memory: int | None) -> int:
    """The size of a chunk of float32 logits on a GPU of so many bytes, or on a CPU."""
    return CHUNK_BYTES if gpu_memory is None else max(GPU_LEAST, min(GPU_CHUNK_BYTES, gpu_memory // GPU_SHARE))


def _gpu_memory() -> int:
    return int(paddle.device.cuda.get_device_properties().total_memory)


class _ChunkedCrossEntropy(paddle.autograd.PyLayer):
    """Weighted sum over positions of -log softmax(h W)[label], or of what token losses make of that, with both
    gradients computed beside it, chunk by chunk.

    Gradients are of ``counts.factor`` times the sum, which is what goes backward. In 16 bits softmax - onehot is
    rounded, and of float16 its small values would be lost before a loss scale that came later could save them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        labels: Any,
        inputs: Any | None,
        matrix: Any | None,
        shape: _Shape,
        gradients: tuple[bool, bool],
        update: Update | None,
        vocabulary: Vocabulary,
        counts: _Counts,
        other: TokenLosses | None,
    ) -> Any:
        rows, transpose_y = _rows(weight, shape.transpose_y, vocabulary), shape.transpose_y
        learns = any(gradients) or (update is not None and update.learns)
        total = paddle.zeros([], "float64")
        hidden_grads, weight_grad = [], None
        columns = 0 if other is None else _columns(weight, transpose_y, vocabulary)
        read = _read(weight, hidden, shape.kernels)
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            part, label = hidden[here], labels[here]
            logits = shape.logits(part, read, update, here)
            capped = None if shape.cap is None else logits.clone()
            slopes = None
            if other is None:
                losses, probabilities = _losses(logits, label, shape, vocabulary)
            else:
                losses, probabilities, slopes = _other_losses(logits, label, shape, vocabulary, other, columns, learns)
            total += counts.weighted(losses, here).sum()
            if not learns:
                del logits, capped, probabilities
                continue
            difference = _difference(probabilities, label, vocabulary, slopes)
            difference = counts.scaled(shape.slope(difference, capped), here).astype(hidden.dtype)
            if update is not None and update.learns:
                difference = update.take(difference, here)
            if gradients[0]:
                product = shape.kernels.product(difference, read, transpose_y=not transpose_y)
                hidden_grads.append(vocabulary.total(product))
            if gradients[1]:
                left, right = (difference, part) if transpose_y else (part, difference)
                share = shape.kernels.product(left, right, transpose_x=True).astype("float32")  # 16 bits lose summands
                weight_grad = share if weight_grad is None else weight_grad.add_(share)
                del share, left, right
            del logits, capped, probabilities, difference  # before there are those of the next chunk
        hidden_grad = paddle.concat(hidden_grads).astype(hidden.dtype) if hidden_grads else None
        ctx.grads = [hidden_grad, None if weight_grad is None else weight_grad.astype(weight.dtype), None]
        if update is not None:
            ctx.grads += update.gradients()
        ctx.factor = counts.factor
        return total.astype("float32")

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        grads, ctx.grads, upstream = ctx.grads, None, upstream / ctx.factor
        return tuple(None if one is None else one * upstream.astype(one.dtype) for one in grads)


def target_loss(
    hidden: Any,
    labels: np.ndarray,
    lm_head: Any,
    factor: float = 1.0,
    weights: np.ndarray | None = None,
    other: TokenLosses | None = None,
) -> Any:
    """The summed cross-entropy (nats, a scalar float32 tensor) of all positions with a label, each times its weight.

    ``hidden`` [B, S, hidden]; ``labels`` numpy int64 [B, S], already shifted, -100 where there is no target;
    ``lm_head`` has a ``weight`` [hidden, V] ([V, hidden] where it has ``transpose_y``), and may have a ``scale`` and a
    ``cap`` for the logits, and a ``vocabulary`` where processes share it. ``factor`` is what the loss is going to be
    multiplied with before it goes backward, not 0: gradients in 16 bits have it before they are rounded. ``weights``
    numpy float32 [B, S]; None: every position with a label counts 1. ``other`` makes another loss of each position.
    """
    chosen, label = _targets(hidden, labels)
    if label is None:
        return hidden.sum() * 0.0
    lm_head, update = _apart(lm_head, chosen)
    weight = lm_head.weight
    learning = paddle.is_grad_enabled()
    gradients = (learning and not chosen.stop_gradient, learning and not weight.stop_gradient)
    factor = 1.0 if product_dtype(hidden) == paddle.float32 else factor
    counts = _Counts.of(labels, weights, factor, hidden.place)
    pair = (None, None) if update is None else (update.inputs, update.matrix)
    return _ChunkedCrossEntropy.apply(
        *(chosen, weight, label, *pair), _Shape.of(lm_head), gradients, update, _vocabulary(lm_head), counts, other
    )


@paddle.no_grad()
def target_scores(hidden: Any, labels: np.ndarray, lm_head: Any) -> tuple[float, int]:
    """The summed cross-entropy (nats), and how many labels are the likeliest token; arguments as above."""
    chosen, label = _targets(hidden, labels)
    if label is None:
        return 0.0, 0
    lm_head, update = _apart(lm_head, chosen)
    shape, vocabulary = _Shape.of(lm_head), _vocabulary(lm_head)
    total, correct = paddle.zeros([], "float64"), paddle.zeros([], "int64")
    for logits, part in _logits(chosen, label, lm_head, shape, update):
        correct += (_likeliest(logits, vocabulary) == part).astype("int64").sum()
        total += _losses(logits, part, shape, vocabulary)[0].sum()
    total, correct = paddle.stack([total, correct.astype("float64")]).tolist()
    return total, int(correct)


@paddle.no_grad()
def target_losses(hidden: Any, labels: np.ndarray, lm_head: Any) -> np.ndarray:
    """The cross-entropy (nats) of each position, float64 [B, S], 0 where there is no label; arguments as above."""
    chosen, label = _targets(hidden, labels)
    found = np.zeros(labels.shape, np.float64)
    if label is not None:
        lm_head, update = _apart(lm_head, chosen)
        shape, vocabulary = _Shape.of(lm_head), _vocabulary(lm_head)
        parts = [_losses(*each, shape, vocabulary)[0] for each in _logits(chosen, label, lm_head, shape, update)]
        found[labels != IGNORED] = paddle.concat(parts).numpy()[:, 0]
    return found


def _logits(hidden: Any, label: Any, lm_head: Any, shape: _Shape, update: Update | None) -> Iterator[tuple[Any, Any]]:
    """Logits float32 [n, columns that are here] and labels [n] of one chunk after the other."""
    rows = _rows(lm_head.weight, shape.transpose_y, _vocabulary(lm_head))
    read = _read(lm_head.weight, hidden, shape.kernels)
    for start in range(0, hidden.shape[0], rows):
        here = slice(start, start + rows)
        yield shape.logits(hidden[here], read, update, here), label[here]


def _likeliest(logits: Any, vocabulary: Vocabulary) -> Any:
    """The likeliest token of each position, the first of equals."""
    best = logits.argmax(axis=-1)
    if vocabulary.start is None:
        return best
    # Where the maximum is in several processes, the least token is the greatest of the negatives.
    own = logits.max(axis=-1)
    highest, last = vocabulary.maximum(own.clone()), paddle.full_like(best, -(1 << 30))
    return -vocabulary.maximum(paddle.where(own == highest, -(best + vocabulary.start), last))


def _targets(hidden: Any, labels: np.ndarray) -> tuple[Any, Any | None]:
    """The hidden states [n, hidden] and labels [n] of the positions with a label; None where there is none.

    Found on the host, where labels are: a GPU would have to be waited for, to learn how many there are.
    """
    hidden, labels = hidden.reshape([-1, hidden.shape[-1]]), labels.reshape(-1)
    positions = np.flatnonzero(labels != IGNORED)
    if not len(positions):
        return hidden, None
    return paddle.gather(hidden, paddle.to_tensor(positions)), paddle.to_tensor(labels[positions])


def batch_loss(model: Any, batch: Batch) -> Any:
    """Summed loss of a batch's target tokens, each times its weight; a scalar tensor."""
    return target_loss(hidden_states(model, batch), batch.labels, model.lm_head, weights=batch.weights)
