"""Lines of ``metrics.jsonl`` as plugins take part in them: numbers of their own (``sft_metrics``), and who is told."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from sft.foreign_text import shown
from sft.training.shared import shared

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.training.journal import Journal


def measured(run: CoreRun, record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with what plugins measure beside it. Each process asks its own; the main one's answers are written."""
    own: dict[str, Any] = {}
    for name in run.plugins.implementing("sft_metrics"):
        for key, value in (run.plugins.ask(name, "sft_metrics", run=run, record=record) or {}).items():
            full = f"{name}/{key}"
            if math.isfinite(value):
                own[full] = int(value) if isinstance(value, numbers.Integral) else float(value)
            elif full not in run.not_finite:
                run.not_finite.add(full)
                run.say(
                    f"note: {shown(full)} is {value} at step {record['step']}; it is left out where it is not finite"
                )
    return {**record, **own}


def write(run: CoreRun, journal: Journal, line: dict[str, Any]) -> None:
    """Write a line, and tell plugins of it. All processes take part."""

    def written() -> None:
        run.keep_folder()
        journal.write(line)

    shared(run.strategy, written)
    run.hook.sft_logged(run=run, record=line)
