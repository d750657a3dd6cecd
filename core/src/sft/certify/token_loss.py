"""What a loss of tokens that a plugin makes gives by itself: ``sft.testing.token_loss``, from which tests import it."""

from __future__ import annotations

import numpy as np

from sft.seams import TokenLoss


def token_loss(part: TokenLoss, logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Σ of what ``part`` makes of the cross-entropy of each position (nats), and its gradient in the logits, float32
    [n, V], computed as in training. ``logits`` float32 [n, V], ``labels`` int64 [n], -100 where there is none."""
    from types import SimpleNamespace

    import paddle

    from sft.training.loss import target_loss
    from sft.training.token_losses import TokenLosses

    hidden = paddle.to_tensor(logits[None].astype(np.float32), stop_gradient=False)
    lm_head = SimpleNamespace(weight=paddle.eye(logits.shape[1]))
    loss = target_loss(hidden, labels[None], lm_head, 1.0, None, TokenLosses([("The loss that is tested", part)]))
    loss.backward()
    return float(loss), hidden.grad.numpy()[0]
