"""What a step minimises (``sft_objective``): cross-entropy, where no plugin says anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.distributed.parts import is_elsewhere
from sft.errors import UsageError
from sft.plugins.calls import checking, mistaken
from sft.seams import Batch, Losses, Objective
from sft.settings.best_metric import best_metric
from sft.settings.checks import check_alone
from sft.training.loss import target_loss, target_losses, target_scores
from sft.training.token_losses import TokenLosses

if TYPE_CHECKING:
    from sft.context import CoreRun

OWN = "eval_objective"
"""The mean of what a run minimises, in the record of an evaluation."""


@dataclass(frozen=True)
class ChunkedLosses:
    """Described at :class:`sft.Losses`. ``factor`` is what a loss is multiplied with before it goes backward. ``model``
    has another head within :class:`sft.Reference`."""

    model: Any
    factor: float
    other: TokenLosses | None

    def total(self, hidden: Any, labels: np.ndarray, weights: np.ndarray | None = None) -> Any:
        return target_loss(hidden, labels, self.model.lm_head, self.factor, weights, self.other)

    def each(self, hidden: Any, labels: np.ndarray) -> np.ndarray:
        return target_losses(hidden, labels, self.model.lm_head)


class CrossEntropy:
    """The mean cross-entropy of the targets, each of which counts what it weighs; where token losses are active, what
    they make of it."""

    values: tuple[str, ...] = ()

    def weight(self, batch: Batch) -> float:
        return batch.target_weight

    def loss(self, losses: Losses, hidden: Any, batch: Batch) -> tuple[Any, Sequence[float]]:
        return losses.total(hidden, batch.labels, batch.weights), ()


@dataclass(frozen=True)
class RunObjective:
    """What a run minimises, bound to its model; what goes wrong in it is said with the name of its plugin."""

    objective: Objective = CrossEntropy()
    token_losses: TokenLosses | None = None
    who: str | None = None
    """The plugin whose objective it is; None: cross-entropy."""

    @property
    def values(self) -> tuple[str, ...]:
        return self.objective.values

    @property
    def is_plain(self) -> bool:
        """Whether it is cross-entropy and nothing else, which is measured anyway."""
        return self.who is None and self.token_losses is None

    def weight(self, batch: Batch) -> float:
        if self.who is None:
            return self.objective.weight(batch)
        return float(checking(self.objective.weight, float, "the weight of a batch", self.who)(batch))

    def loss(self, model: Any, factor: float, hidden: Any, batch: Batch) -> tuple[Any, Sequence[float]]:
        """The loss of a batch, and the sums of :attr:`values`; ``factor`` as :class:`ChunkedLosses` has it."""
        losses = ChunkedLosses(model, factor, self.token_losses)
        if self.who is None:
            return self.objective.loss(losses, hidden, batch)
        found, values = checking(self.objective.loss, tuple[Any, Any], "the loss of a batch", self.who)(
            losses, hidden, batch
        )
        if len(values) != len(self.values):
            raise mistaken(f"{len(values)} values where {len(self.values)} have names", "the loss of a batch", self.who)
        return found, [float(value) for value in values]

    def measured(self, hidden: Any, batch: Batch, model: Any) -> list[float]:
        """Of a batch in evaluation: the summed cross-entropy, in which weights do not count, in how many places the
        target is the likeliest token, and (unless they are the same) the objective's own loss and values."""
        own, right = target_scores(hidden, batch.labels, model.lm_head)
        if self.is_plain:
            return [own, right]
        found, values = self.loss(model, 1.0, hidden, batch)
        return [own, right, float(found), *values]

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of what :meth:`measured` gives beyond the first two."""
        return () if self.is_plain else ("objective", *self.values)


def objective_of(run: CoreRun) -> RunObjective:
    """The objective of a run whose model is set up. Raises :class:`UsageError` where it cannot be computed as the model
    is divided."""
    found = _asked_of_plugins(run)
    if found.is_plain and run.settings.training.load_best_model_at_end and best_metric(run.settings)[0] == OWN:
        raise UsageError(
            "metric_for_best_model objective: what this run minimises is cross-entropy, which is loss; give that."
        )
    return found


def _asked_of_plugins(run: CoreRun) -> RunObjective:
    provider, given = run.plugins.provider("sft_objective"), run.hook.sft_objective(run=run)
    answers = {n: run.plugins.ask(n, "sft_token_loss", run=run) for n in run.plugins.implementing("sft_token_loss")}
    parts = [(name, part) for name, part in answers.items() if part is not None]
    token_losses = TokenLosses([(run.plugins.who(name), part) for name, part in parts]) if parts else None
    if provider is None or given is None:
        return RunObjective(token_losses=token_losses)
    check_alone(provider, [name for name, _ in parts])
    if any(is_elsewhere(parameter) for _, parameter in run.strategy.parameters(run.model)):
        raise UsageError(
            f"Plugin {provider} minimises something for which each process needs all layers, and here the model is "
            "divided into stages; leave pipeline parallelism out."
        )
    who = run.plugins.who(provider)
    for name in given.values:
        if not all(name.partition("/")):
            raise mistaken(f"a value called {name}, where a name such as part/{name} is expected", "sft_objective", who)
    return RunObjective(given, who=who)
