"""Plugin ``early-stopping``: a run ends when its evaluations get no better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft import Run

LOWER = ("loss", "ppl", "objective")
"""What the name of a number ends with of which a lower one is better."""


@dataclass
class EarlyStoppingOptions:
    early_stopping_patience: int = sft.option(
        1, "evaluations one after the other that bring no improvement, with which the run ends", minimum=1
    )
    early_stopping_threshold: float = sft.option(
        0.0, "how much better than the best so far the metric must be, in its own unit", minimum=0
    )
    early_stopping_metric: str | None = sft.option(
        None, "number of an evaluation that decides, such as eval_loss; unset: metric_for_best_model"
    )
    early_stopping_greater_is_better: bool | None = sft.option(
        None,
        "whether a greater one of early_stopping_metric is better; unset: not if its name ends with loss, ppl or "
        "objective",
    )


class EarlyStopping(sft.Plugin):
    """Asks the run to stop after ``patience`` evaluations that were not better than the best before them by more than
    ``threshold``. The count is that of transformers' ``EarlyStoppingCallback``: the best moves with each improvement,
    be it smaller than the threshold, and the evaluation before training does not count."""

    name = "early-stopping"
    api_version = ">=1.1,<2"
    summary = "End the run when evaluations get no better."
    reference = "transformers' EarlyStoppingCallback"
    reads = ("metric_for_best_model", "greater_is_better")
    Options = EarlyStoppingOptions
    certify = sft.Trial(settings={"evaluation_strategy": "steps", "eval_steps": 1, "max_steps": 4})

    def __init__(self, options: EarlyStoppingOptions) -> None:
        super().__init__(options)
        self._best: float | None = None
        self._without = 0
        """Evaluations without an improvement, since the last one that brought one."""

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        training = run.settings.training
        if training.do_train and training.evaluation_strategy == "no":
            raise sft.UsageError(
                "early-stopping goes by evaluations on the way, and evaluation_strategy is no; set it to steps or "
                "epoch, or leave early-stopping out."
            )
        if self.options.early_stopping_metric is None and self.options.early_stopping_greater_is_better is not None:
            raise sft.UsageError(
                "early_stopping_greater_is_better belongs to early_stopping_metric, which is not set; set that too, or "
                "greater_is_better, which belongs to metric_for_best_model."
            )

    @sft.hookimpl
    def sft_run_started(self, run: Run) -> None:
        key, _ = self._metric(run)
        which = "best" if run.settings.training.load_best_model_at_end else "last"
        run.say(
            f"early-stopping: by {key}, after {self._count()} without an improvement; the run ends with its {which} "
            "weights (load_best_model_at_end)"
        )

    @sft.hookimpl
    def sft_evaluated(self, run: Run, record: dict[str, Any]) -> None:
        (key, greater), first = self._metric(run), not record["step"]
        value = record.get(key)
        if not isinstance(value, (int, float)) and self._best is None and (key.startswith("eval_") or not first):
            numbers = [name for name, one in record.items() if isinstance(one, (int, float))]
            raise sft.UsageError(
                f"early-stopping: evaluations of this run have no number {sft.shown(key)}; they have "
                f"{', '.join(numbers)}."
            )
        if first or not run.settings.training.do_train:
            return
        value = float(value) if isinstance(value, (int, float)) else math.nan  # a plugin's, which was not finite
        best = value if self._best is None else self._best
        gain = math.inf if self._best is None else value - best if greater else best - value
        self._without = 0 if gain > self.options.early_stopping_threshold else self._without + 1
        if self._without >= self.options.early_stopping_patience:
            run.control.stop(self._reason(key, greater, value, best))
        self._best = value if gain > 0 else best

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        return {"metric": self._metric(run)[0], "best": self._best, "without": self._without}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any]) -> None:
        key, _ = self._metric(run)
        if state["metric"] == key:
            self._best, self._without = state["best"], state["without"]
        else:
            run.say(f"note: early-stopping went by {state['metric']}, and now goes by {key}: it counts anew")

    def _metric(self, run: Run) -> tuple[str, bool]:
        """The decisive number's name in an evaluation's record, and whether a greater one is better."""
        own, given = self.options.early_stopping_metric, self.options.early_stopping_greater_is_better
        if own is None:
            return sft.best_metric(run.settings)
        return own, not own.endswith(LOWER) if given is None else given

    def _reason(self, key: str, greater: bool, value: float, best: float) -> str:
        way, side = ("risen", "above") if greater else ("fallen", "below")
        threshold = self.options.early_stopping_threshold
        far = f"{way} by more than {threshold:g} {side}" if threshold else f"{way} {side}"
        return f"early-stopping: {key} is {value:.4f}, and has not {far} {best:.4f} in {self._count()}"

    def _count(self) -> str:
        patience = self.options.early_stopping_patience
        return f"{patience} evaluation{'s' * (patience > 1)}"
