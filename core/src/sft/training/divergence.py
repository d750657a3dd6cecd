"""Numbers that are no longer finite: noticed before they are written, with an error that says what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from sft.errors import SftError, UsageError
from sft.training.checkpoint_folder import checkpoints, find_checkpoint

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.training.optimizer import Optimizer


def check_finite(run: CoreRun, optimizer: Optimizer) -> None:
    """Refuse, before anything is written or removed, trained weights of which a value is NaN or infinite.

    All processes raise the same :class:`SftError`, which names a tensor. A step with a finite loss and a finite
    gradient can still make such weights.
    """
    names = [name for name, parameter in run.strategy.parameters(run.model) if not parameter.stop_gradient]
    bad = set(not_finite(optimizer.parameters))
    first = min((number for number, name in enumerate(names) if name in bad), default=len(names))
    first = -int(run.strategy.largest(-first))  # the smallest of all processes
    if first < len(names):
        raise SftError(
            f"The weights are no longer finite after step {run.step} ({names[first]} has values that are NaN or "
            f"infinite), and none of them has been saved; {_cure(run)}."
        )


def not_finite(parameters: Mapping[str, Any]) -> list[str]:
    """The names of those tensors that are here and hold a value that is NaN or infinite."""
    with paddle.no_grad():
        return [name for name, p in parameters.items() if p._is_initialized() and not bool(paddle.isfinite(p).all())]


def explained(run: CoreRun, what: str) -> SftError:
    """The error of a loss that is not finite: ``what`` is so, why, and what helps."""
    bad = not_finite(dict(run.model.named_parameters()))
    if run.step:
        where = f"; {bad[0]} holds values that are not finite" if bad else ""
        return SftError(f"{what}{where}; {_cure(run)}.")
    model = run.settings.model.model_name_or_path
    if bad:
        cure = f"{bad[0]} of {model} holds values that are NaN or infinite: replace the model"
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


def _cure(run: CoreRun) -> str:
    last = last_checkpoint(run)
    go_on = f"resume from {last}" if last is not None else "start again, for there is no checkpoint"
    return f"lower learning_rate ({run.settings.training.learning_rate:g}), and {go_on}"
