"""A run that runs out of memory ends in one sentence, which says what would fit."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft import hookspecs
from sft.errors import PluginError, SftError
from sft.foreign_text import shown
from sft.plugins.discovery import with_refined
from sft.plugins.registry import Plugins
from sft.plugins.requests import requests
from sft.settings.reading import build
from sft.training.checkpoint_folder import checkpoints
from sft.training.report import own_report

if TYPE_CHECKING:
    from sft.context import CoreRun

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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


def device_memory() -> tuple[str, int]:
    """Where the run computes, "cpu" or "gpu", and the bytes that it could have there."""
    paddle = sys.modules.get("paddle")
    if paddle is not None and paddle.device.get_device().startswith("gpu"):
        return "gpu", int(paddle.device.cuda.get_device_properties().total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return "cpu", min(limit for limit in limits if limit > 0)


def _place(run: CoreRun) -> str:
    if not run.executes or not own_report(run):
        return " before the first step"
    return f" after step {run.step}"


def _advice(run: CoreRun) -> str | None:
    """What installed plugins say would fit, whether or not they are active in the run."""
    device, memory = device_memory()
    for name in requests("advice").get("memory", []):
        try:
            plugins = Plugins.load(with_refined(name), hookspecs)
            plugins.start(build({}, plugins).options)
            for answer in plugins.hook.sft_memory_advice(values=run.given, device=device, memory=memory):
                return str(answer)
        except (Exception, MemoryError):  # advice must not hide what has happened
            continue
    return None


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
