"""What the best model is (``metric_for_best_model``): which number decides, and whether there can be one."""

from __future__ import annotations

from sft.errors import UsageError
from sft.settings.arguments import Settings

ANSWER_SCORES = ("bleu4", "rouge1", "rouge2", "rougel")
"""The scores of the model's own answers (``eval_with_do_generation``)."""
LOWER = ("loss", "ppl", "objective")
GREATER = ("accuracy",)


def check_best(settings: Settings) -> None:
    """Refuse settings with which no best model could be found. The best one is that of a checkpoint."""
    training = settings.training
    best_metric(settings)
    if not training.load_best_model_at_end:
        return
    save, evaluate = training.save_strategy, training.evaluation_strategy
    if save != evaluate or save == "no":
        raise UsageError(
            f"load_best_model_at_end needs a checkpoint at each evaluation, and save_strategy is {save}, "
            f"evaluation_strategy {evaluate}; set both to steps or both to epoch."
        )
    eval_steps = training.eval_steps or training.logging_steps
    if save == "steps" and training.save_steps % eval_steps:
        raise UsageError(
            f"load_best_model_at_end needs an evaluation at each checkpoint: save_steps {training.save_steps} is no "
            f"multiple of eval_steps {eval_steps}; change one of them."
        )


def best_metric(settings: Settings) -> tuple[str, bool]:
    """The key of an evaluation's record that decides (``metric_for_best_model``, or else the loss), and whether a
    greater one is better; raises :class:`UsageError` for a number that evaluations of these settings do not have."""
    training = settings.training
    name = (training.metric_for_best_model or "loss").lower().removeprefix("eval_")
    known = [*LOWER, *GREATER, *(ANSWER_SCORES if settings.data.eval_with_do_generation else ())]
    if name not in known:
        more = ", which needs eval_with_do_generation" if name in ANSWER_SCORES else ""
        raise UsageError(f"metric_for_best_model: expected one of {', '.join(known)}, got {name!r}{more}.")
    greater = training.greater_is_better
    return f"eval_{name}", name not in LOWER if greater is None else greater
