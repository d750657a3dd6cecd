"""Reports as files: what a run leaves in its folder when it ends, and what ``sft report`` writes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.context import CoreRun
from sft.errors import UsageError
from sft.files import write_text
from sft.pages import check_place
from sft.run_report import words
from sft.run_report.gather import read_run
from sft.run_report.page import MADE_BY, page
from sft.run_report.value import PAGE, RunReport
from sft.training.report import own_report, sentence

_BEGINS = f'{{"made_by": "{MADE_BY}"'


def leave_report(run: CoreRun) -> None:
    """Write what people read of a run that has ended into its folder. Nothing that goes wrong here is the run's."""
    if not own_report(run):
        return
    place = run.output_dir / PAGE
    try:
        write(place, [read_run(run.output_dir)])
        if not run.finished:  # what says that a run has finished says where its report is, too
            run.say(f"report: {place}")
    except Exception as error:
        for path in (place, beside(place)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # of this run, from before it went on
        run.say(
            f"note: the run's report could not be written ({sentence(error)}); sft report {run.output_dir} writes it"
        )


def check(place: Path) -> None:
    """Refuse a place for a page where it, or the JSON beside it, would take the place of something else."""
    check_place(place, MADE_BY)
    other = beside(place)
    try:
        is_ours = not other.exists() or other.read_bytes()[: len(_BEGINS)] == _BEGINS.encode()
    except OSError:
        is_ours = False
    if not is_ours:
        raise UsageError(f"html: {other}, which is written beside the page, is there and is none of {MADE_BY}'s.")


def write(place: Path, runs: Sequence[RunReport]) -> None:
    """Write the page of ``runs``, and the same as JSON beside it."""
    write_text(beside(place), json.dumps(as_json(runs), ensure_ascii=False, allow_nan=False) + "\n")
    write_text(place, page(runs))


def beside(place: Path) -> Path:
    """Where the JSON of the page at ``place`` is."""
    return place.with_suffix(".json")


def as_json(runs: Sequence[RunReport]) -> dict[str, Any]:
    """What the page shows, for programs: ``runs``, and of several the settings in which they ``differ``."""
    values: dict[str, Any] = {"made_by": MADE_BY, "runs": [run.as_json() for run in runs]}
    return values if len(runs) == 1 else {**values, "differ": words.differences(runs)}
