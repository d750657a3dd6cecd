"""TracInCP (arXiv 2002.08484): what the steps on a record have done to the loss of an answer, to first order.

A step with learning rate η and gradients divided by the weight W of its targets changes the loss of an answer by -η/W
∇answer · ∇record for each of its records; where its gradients were clipped, by as much less. The gradients of a step
are those of the weights before it; here they are those of the checkpoint nearest to it, so each step counts once, with
its own rate. A score is the sum of η/W ∇answer · ∇record over the steps: above 0 the record has lowered the answer's
loss.

``adam`` puts AdamW's own scale between the two, 1/(√v̂ + ε) of each value, from what the checkpoint keeps of the
optimizer: AdamW steps along that, and not along the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import sft
from sft import UsageError

METHODS = ("tracin", "adam")


@dataclass(frozen=True)
class Traced:
    """What was found of some answers.

    Attributes:
        losses: float64 [checkpoints, answers], the mean cross-entropy (nats) of each answer's tokens.
        scores: float64 [answers, records], of the records that were asked for, in their order.
        passes: How many records went forward and backward.
    """

    losses: np.ndarray
    scores: np.ndarray
    passes: int


def shares(steps: Iterable[sft.PastStep], checkpoints: Sequence[int], count: int) -> np.ndarray:
    """float64 [checkpoints, count]: Σ η/W, times what clipping left of it, over the steps that each of ``count``
    records was in, at the checkpoint that is nearest to each step; of two that are equally near, at the earlier one."""
    found, places = np.zeros((len(checkpoints), count)), np.asarray(checkpoints, np.float64)
    for step in steps:
        nearest = int(np.abs(places - (step.number - 0.5)).argmin())  # it leads from weights before it to those after
        if step.weight:
            np.add.at(found[nearest], list(step.records), step.rate * step.clip / step.weight)
    return found


def trace(
    opened: sft.Reopened,
    answers: Sequence[sft.Batch],
    checkpoints: Sequence[int],
    records: Sequence[int],
    weights: np.ndarray,
    method: str = METHODS[0],
) -> Traced:
    """The scores of ``records`` for ``answers``, each a batch of one row (:meth:`sft.Reopened.answered`), at the steps
    of ``checkpoints``; ``weights`` are what :func:`shares` gives. The model is afterwards as the last of them has it.

    Raises :class:`UsageError` where the ``method`` needs what the run's optimizer does not keep."""
    losses, scores = np.zeros((len(checkpoints), len(answers))), np.zeros((len(answers), len(records)))
    passes = passes_of(weights, records)
    with opened.run.progress.task("tracing", "records", passes) as task:
        for row, step in enumerate(checkpoints):
            opened.restore(step, optimizer=method == "adam")
            losses[row], wanted = directions(opened, answers, method)
            for place, record in enumerate(records):
                if weights[row, record]:
                    scores[:, place] += weights[row, record] * products(opened, wanted, record)
                    task.advance()
    return Traced(losses, scores, passes)


def passes_of(weights: np.ndarray, records: Sequence[int]) -> int:
    """How often a record goes forward and backward: once for each checkpoint near which it was learned."""
    return int(np.count_nonzero(weights[:, list(records)]))


def directions(opened: sft.Reopened, answers: Sequence[sft.Batch], method: str) -> tuple[list[float], dict[str, Any]]:
    """The mean losses of ``answers``, and for each parameter a float32 tensor [answers, values]: the gradients of these
    losses, each value times what the optimizer multiplies it with beside the rate of the step."""
    import paddle

    factors: dict[str, Any] = {n: g.learning_rate for g in opened.optimizer.groups for n in g.parameters}
    if method == "adam":
        factors = {name: scale * factors[name] for name, scale in adam_scales(opened)}
    losses: list[float] = []
    found: dict[str, list[Any]] = {name: [] for name in factors}
    for batch in answers:
        loss = opened.cross_entropy(batch) / batch.target_tokens
        losses.append(float(loss))
        gradients = opened.gradients(loss)
        for name, factor in factors.items():
            parameter = opened.trainable[name]
            gradient = gradients.get(name)
            scaled = paddle.zeros(parameter.shape, "float32") if gradient is None else gradient * factor
            found[name].append(scaled.reshape([-1]))
    return losses, {name: paddle.stack(each) for name, each in found.items()}


def products(opened: sft.Reopened, wanted: Mapping[str, Any], record: int) -> np.ndarray:
    """float64 [answers]: the gradient of a record's loss (the sum over its targets) times each of the directions."""
    import paddle

    gradients = opened.gradients(opened.loss(opened.batch(record)))
    parts = [wanted[name].matmul(gradient.reshape([-1])) for name, gradient in gradients.items()]
    if not parts:
        return np.zeros(next(iter(wanted.values())).shape[0])
    return np.asarray(paddle.stack(parts).astype("float64").sum(axis=0).numpy())


def adam_scales(opened: sft.Reopened) -> Iterator[tuple[str, Any]]:
    """Of each parameter 1/(√v̂ + ε), float32 of its shape, as AdamW has it after the step of the checkpoint."""
    training = opened.run.settings.training
    for name, kept in opened.optimizer.kept.items():
        if not isinstance(opened.optimizer, sft.AdamW) or "moment2" not in kept:
            raise UsageError(
                f"--method adam needs the second moments that AdamW keeps, and optim {training.optim} keeps none of "
                f"{name}; leave --method out."
            )
        # The power that is kept is that of the next step, one more than the steps that were made.
        beta = training.adam_beta2
        done = 1.0 - float(kept["beta2_pow_acc"].numpy()[0]) / beta if beta else 1.0
        yield name, 1.0 / ((kept["moment2"] / done).sqrt() + training.adam_epsilon)
