"""The best model of a run: which evaluation was best, and going back to its checkpoint at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import SftError, UsageError
from sft.settings.best_metric import best_metric
from sft.training.checkpoint import restore_model
from sft.training.checkpoint_folder import checkpoints, looks_whole, step_of, whole_checkpoint

if TYPE_CHECKING:
    from sft.context import CoreRun


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


def load_best(run: CoreRun) -> int | None:
    """Go back to the checkpoint whose evaluation was best; its step, or None if there is no such checkpoint."""
    if not run.best:
        run.say("note: no checkpoint was evaluated, so the run ends with its last weights")
        return None
    folder = run.output_dir / f"checkpoint-{run.best['step']}"
    run.strategy.wait()  # the main process may still be writing it
    try:
        restore_model(run, *whole_checkpoint(folder, run.progress), "best")
    except UsageError as error:
        raise _without_best(run, folder, error) from error
    key, _ = best_metric(run.settings)
    run.evaluation = run.best
    run.say(f"best model: {folder.name}, {key} {run.best[key]:.4f}")
    return step_of(folder)


def _without_best(run: CoreRun, best: Path, error: UsageError) -> SftError:
    """The error to raise if the ``best`` checkpoint cannot be restored at the end. It says where other weights are."""
    left = [folder for folder in checkpoints(run.output_dir) if folder != best]
    if not left:
        where = "there is no other checkpoint, so nothing is left of the run"
    elif step_of(left[-1]) == run.step:
        where = f"the weights after its last step are in {left[-1]}"
    else:
        where = f"the last weights that are left are those in {left[-1]}, and the run ended after step {run.step}"
    cause = str(error).partition("; ")[0]
    return SftError(f"The run cannot end with its best model ({cause.rstrip('.')}); {where}.")
