"""Cross-entropy of target positions alone, through lm_head in chunks: logits [B, S, V] never exist."""

from __future__ import annotations

from typing import Any

import paddle

from sft.data.encoding import IGNORED

CHUNK_BYTES = 64 << 20
"""Size of one chunk of float32 logits; bounds the memory of the loss whatever the batch."""


def _chunk(part: Any, label: Any, weight: Any, transpose_y: bool) -> tuple[Any, Any, Any, Any]:
    """Of some positions: float32 logits less their maximum, the exponentials of these and their sum, and the losses."""
    logits = paddle.matmul(part, weight, transpose_y=transpose_y).astype("float32")
    logits = logits - logits.max(axis=-1, keepdim=True)
    exponentials = logits.exp()
    normaliser = exponentials.sum(axis=-1, keepdim=True)
    chosen = paddle.take_along_axis(logits, label.unsqueeze(-1), axis=-1)
    return logits, exponentials, normaliser, (normaliser.log() - chosen).astype("float64")


def _rows(weight: Any, transpose_y: bool) -> int:
    """Positions in a chunk."""
    return max(1, CHUNK_BYTES // (4 * (weight.shape[0] if transpose_y else weight.shape[1])))


class _ChunkedCrossEntropy(paddle.autograd.PyLayer):
    """Sum over positions of -log softmax(h W)[label], with both gradients computed beside it, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, labels: Any, transpose_y: bool, gradients: tuple[bool, bool]
    ) -> Any:
        rows = _rows(weight, transpose_y)
        total = paddle.zeros([], "float64")
        hidden_grads, weight_grad = [], None
        for start in range(0, hidden.shape[0], rows):
            part, label = hidden[start : start + rows], labels[start : start + rows]
            _, exponentials, normaliser, losses = _chunk(part, label, weight, transpose_y)
            total += losses.sum()
            if not any(gradients):
                continue
            ones = paddle.ones([label.shape[0], 1], "float32")
            difference = paddle.put_along_axis(
                exponentials / normaliser, label.unsqueeze(-1), -ones, axis=-1, reduce="add"
            ).astype(hidden.dtype)
            if gradients[0]:
                hidden_grads.append(paddle.matmul(difference, weight, transpose_y=not transpose_y))
            if gradients[1]:
                left, right = (difference, part) if transpose_y else (part, difference)
                share = paddle.matmul(left, right, transpose_x=True)
                weight_grad = share if weight_grad is None else weight_grad.add_(share)
        ctx.gradients = gradients
        ctx.grads = (paddle.concat(hidden_grads) if hidden_grads else None, weight_grad)
        return total.astype("float32")

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        hidden_grad, weight_grad = ctx.grads
        ctx.grads = None
        hidden_grad = None if hidden_grad is None else hidden_grad * upstream.astype(hidden_grad.dtype)
        weight_grad = None if weight_grad is None else weight_grad * upstream.astype(weight_grad.dtype)
        return hidden_grad, weight_grad, None


def target_loss(hidden: Any, labels: Any, lm_head: Any) -> Any:
    """The summed cross-entropy (nats, a scalar float32 tensor) of all positions with a label.

    ``hidden`` [B, S, hidden]; ``labels`` int64 [B, S], already shifted, -100 where there is no target;
    ``lm_head`` is PaddleNLP's (its ``weight`` is [hidden, V], or [V, hidden] when tied).
    """
    chosen, label = _targets(hidden, labels)
    if label is None:
        return hidden.sum() * 0.0
    weight = lm_head.weight
    learning = paddle.is_grad_enabled()
    gradients = (learning and not chosen.stop_gradient, learning and not weight.stop_gradient)
    return _ChunkedCrossEntropy.apply(chosen, weight, label, _is_transposed(lm_head), gradients)


@paddle.no_grad()
def target_scores(hidden: Any, labels: Any, lm_head: Any) -> tuple[float, int]:
    """The summed cross-entropy (nats), and how many labels are the likeliest token; arguments as above."""
    chosen, label = _targets(hidden, labels)
    if label is None:
        return 0.0, 0
    transpose_y = _is_transposed(lm_head)
    rows = _rows(lm_head.weight, transpose_y)
    total, correct = paddle.zeros([], "float64"), paddle.zeros([], "int64")
    for start in range(0, chosen.shape[0], rows):
        part = label[start : start + rows]
        logits, _, _, losses = _chunk(chosen[start : start + rows], part, lm_head.weight, transpose_y)
        total += losses.sum()
        correct += (logits.argmax(axis=-1) == part).astype("int64").sum()
    return float(total), int(correct)


def _targets(hidden: Any, labels: Any) -> tuple[Any, Any | None]:
    """The hidden states [n, hidden] and labels [n] of the positions with a label; None where there is none."""
    hidden, labels = hidden.reshape([-1, hidden.shape[-1]]), labels.reshape([-1])
    positions = paddle.nonzero(labels != IGNORED).squeeze(-1)
    if positions.shape[0] == 0:
        return hidden, None
    return paddle.gather(hidden, positions), paddle.gather(labels, positions)


def _is_transposed(lm_head: Any) -> bool:
    return bool(getattr(lm_head, "transpose_y", False))
