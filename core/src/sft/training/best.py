"""The best model of a run: which evaluation was best, and going back to its checkpoint at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import SftError, UsageError
from sft.settings.best_metric import best_metric
from sft.training.checkpoint import restore_model
from sft.training.checkpoint_folder import looks_whole, saved_step, step_of, whole_checkpoint
from sft.training.divergence import last_checkpoint
from sft.training.publish import kept_beside

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.optimizer import Optimizer


def better(run: CoreRun, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The record of ``evaluation`` or the best one so far, whichever is better; the earlier one if they are equal."""
    key, greater = best_metric(run.settings)
    if not run.best or (evaluation[key] > run.best[key] if greater else evaluation[key] < run.best[key]):
        return evaluation
    return run.best


def best_so_far(run: CoreRun, state: dict[str, Any]) -> dict[str, Any]:
    """The best evaluation before a checkpoint. Empty if its own checkpoint is gone, or it lacks the number that decides
    in this run."""
    best: dict[str, Any] = state["best"]
    if not run.settings.training.load_best_model_at_end or not best:
        return {}
    if best_metric(run.settings)[0] in best and looks_whole(run.output_dir / f"checkpoint-{best['step']}"):
        return best
    run.say(f"note: the best model so far (step {best['step']}) is not comparable or not here; the search begins anew")
    return {}


def load_best(run: CoreRun, optimizer: Optimizer) -> int | None:
    """Go back to the checkpoint whose evaluation was best; its step, or None if there is no such checkpoint.

    Raises :class:`SftError` if it is damaged. By then the last weights are in a checkpoint or beside it.
    """
    if not run.best:
        run.say("note: no checkpoint was evaluated, so the run ends with its last weights")
        return None
    folder = run.output_dir / f"checkpoint-{run.best['step']}"
    run.strategy.wait()  # the main process may still be writing it
    found, failure = None, None
    try:
        found = whole_checkpoint(folder, run.progress)
    except UsageError as error:
        failure = error
    if run.strategy.largest(float(found is None)):
        raise _without_best(run, optimizer, folder, failure) from failure
    assert found is not None
    restore_model(run, *found, "best")
    key, _ = best_metric(run.settings)
    run.evaluation = run.best
    run.say(f"best model: {folder.name}, {key} {run.best[key]:.4f}")
    return step_of(folder)


def _without_best(run: CoreRun, optimizer: Optimizer, best: Path, error: UsageError | None) -> SftError:
    """The error to raise if the ``best`` checkpoint cannot be restored at the end. It says where the last weights are,
    which are still in the model."""
    last = last_checkpoint(run)
    where = last if last is not None and last != best and saved_step(last) == run.step else kept_beside(run, optimizer)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    cause = str(error).partition("; ")[0].rstrip(".") if error is not None else "said by another process"
    left = f"the weights after its last step, {run.step}, are in {where}"
    if where is None:
        left = "nor could the weights after its last step be written there; see what is wrong with the disk"
    return SftError(f"The run cannot end with its best model ({cause}); {left}.")
