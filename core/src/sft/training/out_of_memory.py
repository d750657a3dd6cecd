"""A run that runs out of memory ends in one sentence, which says what would fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sft.errors import PluginError, SftError
from sft.foreign_text import shown
from sft.training.checkpoint_folder import checkpoints
from sft.training.memory import asked, device_memory
from sft.training.report import own_report

if TYPE_CHECKING:
    from sft.context import CoreRun


def is_memory(error: BaseException) -> bool:
    """Whether memory is what ``error`` lacks; paddle raises MemoryError too, whatever the device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, PluginError) and isinstance(error.__cause__, MemoryError)
    )


def out_of_memory(run: CoreRun, error: BaseException) -> SftError:
    """The error to raise in place of ``error``: where the run was, what would fit, and what is left of it."""
    cause = error.__cause__ if isinstance(error, PluginError) and error.__cause__ is not None else error
    text = f"Out of memory{_place(run)} ({said(cause)}): {_advice(run) or _cures(run)}"
    found = checkpoints(run.output_dir) if own_report(run) else []
    return SftError(f"{text}; then resume from {found[-1]}." if found else f"{text}.")


def said(error: BaseException) -> str:
    """What paddle or Python says of the memory that it did not get, without paddle's own lines and hints."""
    text = re.sub(r"^.*?ResourceExhausted(?:Error)?[):]*\s*", "", str(error), flags=re.DOTALL)
    return shown(" ".join(re.split(r"\n\s*\n|\[Hint|\(at /", text)[0].split()).rstrip(".")) or "no memory is left"


def _place(run: CoreRun) -> str:
    if not run.executes or not own_report(run):
        return " before the first step"
    return f" after step {run.step}"


def _advice(run: CoreRun) -> str | None:
    """What installed plugins say would fit."""
    device, memory = device_memory()
    text = asked(lambda hook: hook.sft_memory_advice(values=run.given, device=device, memory=memory))
    return None if text is None else str(text)


def _cures(run: CoreRun) -> str:
    training, data = run.settings.training, run.settings.data
    cures = []
    if training.per_device_train_batch_size > 1:
        cures.append(
            f"a smaller per_device_train_batch_size ({training.per_device_train_batch_size}) with more "
            "gradient_accumulation_steps"
        )
    if not training.recompute:
        cures.append("--recompute true")
    cures.append(f"a smaller max_length ({data.max_length})")
    return f"{', '.join(cures[:-1])} or {cures[-1]} needs less" if len(cures) > 1 else f"{cures[0]} needs less"
