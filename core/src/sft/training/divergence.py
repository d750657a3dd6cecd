"""Numbers that are no longer finite: noticed before they are written, with an error that says what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from sft.errors import SftError, UsageError
from sft.training.checkpoint_folder import checkpoints, find_checkpoint, is_checkpoint, saved_step, step_of

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Step
    from sft.optimizer import Optimizer
    from sft.training.journal import Journal

_SHOWN = 8
"""Records of a step that are named."""


def check_finite(run: CoreRun, optimizer: Optimizer) -> None:
    """Refuse, before anything is written or removed, trained weights of which a value is NaN or infinite.

    All processes raise the same :class:`SftError`, which names a tensor. A step with a finite loss and a finite
    gradient can still make such weights.
    """
    first = _first_not_finite(run, optimizer.parameters)
    if first is not None:
        raise SftError(
            f"The weights are no longer finite after step {run.step} ({first} has values that are NaN or infinite), "
            f"and none of them has been saved; {_cure(run)}."
        )


def left_out(run: CoreRun, at: Step, journal: Journal, figures: str) -> str:
    """Count the step ``at``, whose loss or gradient is not finite, and return a line that says so. Raises
    :class:`SftError` where it ends the run: by default, after too many in a row, and where the model itself holds
    values that are not finite, so that no other step could be better. All processes do the same.
    """
    training, records = run.settings.training, _records(run, at)
    still = "no longer" if run.step else "not"
    what = f"The loss or its gradient is {still} finite at step {at.number} ({figures}), {records}"
    if not training.skip_nan_grad or _first_not_finite(run, dict(run.model.named_parameters())):
        raise explained(run, what)
    journal.skipped_in_a_row += 1
    if journal.skipped_in_a_row >= training.max_skipped_in_a_row:
        raise explained(run, f"{what}, which is the last of {journal.skipped_in_a_row} in a row (max_skipped_in_a_row)")
    return f"step {at.number}: skipped, for it is not finite ({figures}), {records}"


def _records(run: CoreRun, at: Step) -> str:
    """The records of a step, as a clause with their files and lines."""
    kept = list(dict.fromkeys(chain.from_iterable(at.rows)))
    shown = at.data.numbers(kept[:_SHOWN])
    try:
        places = "; ".join(run.places(at.place, shown))
    except (SftError, OSError, KeyError):  # the files have changed
        places = "places that cannot be read any more"
    more = f"; and {len(kept) - len(shown):,} more" if len(kept) > len(shown) else ""
    return f"with {len(kept):,} record{'s' * (len(kept) > 1)} ({places}{more})"


def _first_not_finite(run: CoreRun, parameters: Mapping[str, Any]) -> str | None:
    """The first parameter of the model, in any process, that is not finite, of those that are here."""
    names = [name for name, _ in run.strategy.parameters(run.model)]
    bad = set(not_finite(parameters))
    first = min((number for number, name in enumerate(names) if name in bad), default=len(names))
    first = -int(run.strategy.largest(-first))  # the smallest of all processes
    return names[first] if first < len(names) else None


def not_finite(parameters: Mapping[str, Any]) -> list[str]:
    """The names of those tensors that are here and hold a value that is NaN or infinite."""
    with paddle.no_grad():
        return [name for name, p in parameters.items() if p._is_initialized() and not bool(paddle.isfinite(p).all())]


def explained(run: CoreRun, what: str) -> SftError:
    """The error of a loss that is not finite: ``what`` is so, why, and what helps. All processes ask for it."""
    bad = _first_not_finite(run, dict(run.model.named_parameters()))
    if run.step:
        where = f"; {bad} holds values that are not finite" if bad else ""
        return SftError(f"{what}{where}; {_cure(run)}.")
    model = run.settings.model.model_name_or_path
    if bad:
        cure = f"{bad} of {model} holds values that are NaN or infinite: replace the model"
    else:
        cure = f"nothing has been learned yet, so {model} itself computes it: look at its config.json and its weights"
        cure += ", or leave fp16 out, whose range may be too small" if run.precision.dtype == "float16" else ""
    return SftError(f"{what}; {cure}.")


def last_checkpoint(run: CoreRun) -> Path | None:
    """The newest checkpoint of the run, or the one that it went on from."""
    with contextlib.suppress(UsageError):
        written = checkpoints(run.output_dir)
        return written[-1] if written else find_checkpoint(run.settings.training.resume_from_checkpoint, run.output_dir)
    return None


def last_good(run: CoreRun) -> Path | None:
    """The newest checkpoint of the run from which a step has been taken: its weights can be trained on. Those of a
    later one may be finite and ruined all the same, which the step after it shows."""
    written = reversed(checkpoints(run.output_dir))
    return next((folder for folder in written if step_of(folder) < run.taken and is_checkpoint(folder)), None)


def _went_on_from(run: CoreRun) -> Path | None:
    """The checkpoint, maybe another run's, that the run went on from, if it has taken a step since."""
    with contextlib.suppress(UsageError):
        source = find_checkpoint(run.settings.training.resume_from_checkpoint, run.output_dir)
        step = None if source is None else saved_step(source)
        return source if step is not None and step < run.taken else None
    return None


def untried(run: CoreRun, journal: Journal) -> str:
    """What to say of a run that ends with steps that were left out."""
    count, good = journal.skipped_in_a_row, last_good(run) or _went_on_from(run)
    steps = "step was" if count == 1 else f"{count} steps were"
    other = f", or take those of {good}" if good is not None else ""
    return f"the last {steps} skipped, so nothing shows that these weights are good; evaluate them before use{other}"


def _cure(run: CoreRun) -> str:
    good, last = last_good(run) or _went_on_from(run), last_checkpoint(run)
    if good is not None:
        go_on = f"resume from {good}"
    elif last is not None:
        go_on = f"resume from {last}, or start again if that fails too, for no step has been taken from it"
    else:
        go_on = "start again, for there is no checkpoint"
    return f"lower learning_rate ({run.settings.training.learning_rate:g}), and {go_on}"
