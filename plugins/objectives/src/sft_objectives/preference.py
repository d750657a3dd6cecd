"""Direct preference optimisation as a step computes it: cross-entropy of tokens, each with a factor of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from sft.parallel import hidden_states

if TYPE_CHECKING:
    from sft import Batch, Losses, Reference, Run


@dataclass(frozen=True)
class Answers:
    """Of each pair, float64 [pairs]: log π − log π_ref of both answers, and how many tokens these have."""

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray


Slope = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The loss of each pair, and its derivatives in log π of the chosen and of the rejected answer."""


def sigmoid(answers: Answers, beta: float) -> Slope:
    """−log σ(β·Δ), Δ the difference of both log ratios (arXiv 2305.18290, equation 7)."""
    margin = beta * (answers.chosen - answers.rejected)
    slope = -beta * np.exp(-np.logaddexp(0.0, margin))  # −β·σ(−margin)
    return np.logaddexp(0.0, -margin), slope, -slope


def hinge(answers: Answers, beta: float) -> Slope:
    """max(0, 1 − β·Δ) (SLiC, arXiv 2305.10425)."""
    missing = 1.0 - beta * (answers.chosen - answers.rejected)
    slope = np.where(missing > 0, -beta, 0.0)
    return np.maximum(missing, 0.0), slope, -slope


def ipo(answers: Answers, beta: float) -> Slope:
    """(Δ − 1/(2β))², with log ratios as means over tokens (arXiv 2310.12036, equation 17; the means are TRL's)."""
    tokens = np.maximum(answers.chosen_tokens, 1), np.maximum(answers.rejected_tokens, 1)
    off = answers.chosen / tokens[0] - answers.rejected / tokens[1] - 1.0 / (2.0 * beta)
    return off**2, 2.0 * off / tokens[0], -2.0 * off / tokens[1]


LOSSES: dict[str, Callable[[Answers, float], Slope]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


class Preference:
    """The mean loss of pairs: documents of a row that follow each other, the chosen answer first.

    Its gradient is that of cross-entropy in which each token of an answer counts −∂loss/∂log π(answer), which is known
    once both models have read the batch.
    """

    values = (
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )

    def __init__(self, run: Run, reference: Reference, beta: float, loss_type: str) -> None:
        self._run, self._reference, self._beta, self._loss = run, reference, beta, LOSSES[loss_type]

    def weight(self, batch: Batch) -> float:
        return float(sum(len(row) // 2 for row in batch.lengths))

    def loss(self, losses: Losses, hidden: Any, batch: Batch) -> tuple[Any, Sequence[float]]:
        places = documents(batch)
        own = sums(-losses.each(hidden, batch.labels), places)
        with paddle.no_grad(), self._reference():
            reference = sums(-losses.each(hidden_states(self._run.model, batch), batch.labels), places)
        ratios, tokens = own - reference, sums(batch.labels != -100, places)
        answers = Answers(ratios[:, 0], ratios[:, 1], tokens[:, 0], tokens[:, 1])
        each, *slopes = self._loss(answers, self._beta)
        rewards = self._beta * ratios
        values = [
            *(rewards[:, 0].sum(), rewards[:, 1].sum(), float((rewards[:, 0] > rewards[:, 1]).sum())),
            *((rewards[:, 0] - rewards[:, 1]).sum(), own[:, 0].sum(), own[:, 1].sum()),
        ]
        value = float(each.sum())
        if not paddle.is_grad_enabled():
            return paddle.to_tensor(value, "float32"), values
        weights = np.zeros(batch.labels.shape, np.float32)
        for pair, slope in zip(places, np.stack(slopes, axis=-1), strict=True):
            for (row, start, stop), one in zip(pair, slope, strict=True):
                weights[row, start:stop] = -one
        surrogate = losses.total(hidden, batch.labels, weights)
        return surrogate - surrogate.detach() + value, values


Place = tuple[int, int, int]


def documents(batch: Batch) -> list[tuple[Place, Place]]:
    """Of each pair, where its two documents stand: row, first token, and the token after the last."""
    found = []
    for row, lengths in enumerate(batch.lengths):
        edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        each = [(row, start, stop) for start, stop in pairwise(edges)]
        found += list(zip(each[::2], each[1::2], strict=False))
    return found


def sums(values: np.ndarray, places: Sequence[tuple[Place, Place]]) -> np.ndarray:
    """``values`` [B, S] summed over the documents of each pair: float64 [pairs, 2]."""
    found = [[float(values[row, start:stop].sum()) for row, start, stop in pair] for pair in places]
    return np.array(found, np.float64).reshape(-1, 2)
