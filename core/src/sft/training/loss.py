"""Cross-entropy of target positions alone, through lm_head in chunks: logits [B, S, V] never exist."""

from __future__ import annotations

from typing import Any

import paddle

from sft.data.encoding import IGNORED

CHUNK_BYTES = 64 << 20
"""Size of one chunk of float32 logits; bounds the memory of the loss whatever the batch."""


class _ChunkedCrossEntropy(paddle.autograd.PyLayer):
    """Sum over positions of -log softmax(h W)[label], with both gradients computed beside it, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, labels: Any, transpose_y: bool, gradients: tuple[bool, bool]
    ) -> Any:
        vocabulary = weight.shape[0] if transpose_y else weight.shape[1]
        rows = max(1, CHUNK_BYTES // (4 * vocabulary))
        total = paddle.zeros([], "float64")
        hidden_grads, weight_grad = [], None
        for start in range(0, hidden.shape[0], rows):
            part, label = hidden[start : start + rows], labels[start : start + rows]
            logits = paddle.matmul(part, weight, transpose_y=transpose_y).astype("float32")
            logits = logits - logits.max(axis=-1, keepdim=True)
            exponentials = logits.exp()
            normaliser = exponentials.sum(axis=-1, keepdim=True)
            chosen = paddle.take_along_axis(logits, label.unsqueeze(-1), axis=-1)
            total += (normaliser.log() - chosen).astype("float64").sum()
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
    hidden = hidden.reshape([-1, hidden.shape[-1]])
    labels = labels.reshape([-1])
    positions = paddle.nonzero(labels != IGNORED).squeeze(-1)
    if positions.shape[0] == 0:
        return hidden.sum() * 0.0
    chosen = paddle.gather(hidden, positions)
    weight = lm_head.weight
    learning = paddle.is_grad_enabled()
    gradients = (learning and not chosen.stop_gradient, learning and not weight.stop_gradient)
    transpose_y = bool(getattr(lm_head, "transpose_y", False))
    return _ChunkedCrossEntropy.apply(chosen, weight, paddle.gather(labels, positions), transpose_y, gradients)
