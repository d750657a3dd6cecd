"""The loss of target positions by its formula, in float64 and over whole logits."""

from __future__ import annotations

import numpy as np


def reference(
    hidden: np.ndarray, labels: np.ndarray, weight: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """Σ -log softmax(h W)[label] over all positions with a label, each times its weight, and its gradients; ``weight``
    is [hidden, V]."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    logits = hidden @ weight
    logits -= logits.max(-1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = (labels != -100)[..., None] * (1.0 if weights is None else weights[..., None].astype(np.float64))
    chosen = np.eye(weight.shape[1])[np.where(labels == -100, 0, labels)]
    difference = (np.exp(log_softmax) - chosen) * counted
    loss = -(log_softmax * chosen * counted).sum()
    return float(loss), difference @ weight.T, np.einsum("bsh,bsv->hv", hidden, difference)
