"""The folder of a run: what a run must not destroy there, and how the folder is made ready."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UsageError
from sft.files import make_folder, read_report, remove_folder, remove_leftovers, sync
from sft.folder_lock import NAME as LOCK
from sft.folder_lock import FolderLock, check_unused
from sft.foreign_text import shown
from sft.run_log import NAME as LOG
from sft.training.answer_files import GENERATIONS, PATTERNS, SAMPLES, files_of
from sft.training.checkpoint_folder import (
    CLEARS,
    asks_to_resume,
    checkpoints,
    find_checkpoint,
    is_auto,
    is_checkpoint,
    step_of,
)
from sft.training.first_rows import NAME as ROWS
from sft.training.journal import Journal
from sft.training.report import write_report
from sft.training.result import PUBLISHED, RESULT_KEYS
from sft.training.skipped_records import NAME as SKIPPED
from sft.training.steps_file import NAME as STEPS

if TYPE_CHECKING:
    from sft.context import CoreRun

REPORT_FILES = ("report.html", "report.json")
"""What a run leaves at its end, and ``sft report`` writes."""
RESULT_FILES = ("run.json", *PUBLISHED, "metrics.jsonl", LOG, STEPS, SKIPPED, ROWS, *PATTERNS, *REPORT_FILES)
"""What a run writes into its folder beside checkpoints."""


def check_output(run: CoreRun) -> None:
    """Refuse an output folder in which this run would destroy something."""
    training = run.settings.training
    existing = next(path for path in (run.output_dir, *run.output_dir.parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"output_dir {run.output_dir}: {existing} is a file; give a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {run.output_dir}: {existing} is not writable; give another folder.")
    check_unused(run.output_dir, run.say)
    source = find_checkpoint(training.resume_from_checkpoint, run.output_dir)
    if training.overwrite_output_dir and _is_in(run.output_dir, source):
        raise UsageError("A run cannot be continued and overwritten; leave one of the two settings out.")
    places = [("model_name_or_path", str(run.settings.model.model_name_or_path))]
    places += [("dataset_name_or_path", one.path) for one in run.settings.data.sets]
    for name, place in places:
        path = Path(place).expanduser()
        if path.exists() and path.resolve().is_relative_to(run.output_dir.resolve()):
            raise UsageError(
                f"output_dir {run.output_dir} contains {name} {path}, which would be overwritten; change one."
            )
    is_used = holds_run(run.output_dir)
    if not is_used:
        taken = [path.name for pattern in RESULT_FILES for path in run.output_dir.glob(pattern)]
        if taken:
            raise UsageError(
                f"output_dir {run.output_dir} holds {', '.join(taken[:3])}, which are no run's of sft and would be "
                "overwritten; choose another folder."
            )
    if not is_used or training.overwrite_output_dir:
        return
    if asks_to_resume(training.resume_from_checkpoint) and training.do_train:
        report = read_report(run.output_dir)
        if is_auto(training.resume_from_checkpoint):
            _check_ended_early(run.output_dir, report)
        if _is_in(run.output_dir, source):
            return
        # It may have been stopped before its first checkpoint.
        if source is None and report.get("status") != "finished":
            if not holds_result(run.output_dir) or report.get(CLEARS):
                return
            raise UsageError(
                f"output_dir {run.output_dir} holds the result of a run that was stopped after it was written, and no "
                "checkpoint to go on from; take the result, choose another folder, or replace it with "
                "--overwrite_output_dir."
            )
    raise UsageError(
        f"output_dir {run.output_dir} already holds a run; choose another folder, continue it with "
        "--resume_from_checkpoint auto, or replace it with --overwrite_output_dir."
    )


def _check_ended_early(folder: Path, report: dict[str, Any]) -> None:
    """Refuse to go on by ``auto`` with a run that has its result, since somebody has ended it before its last step."""
    result = report.get("result")
    early = result.get("stopped_early") if isinstance(result, dict) else None
    if report.get("status") != "finished" or not isinstance(early, dict):
        return
    left = checkpoints(folder)
    named = f"to train on, name the checkpoint (--resume_from_checkpoint {left[-1]}), or " if left else ""
    raise UsageError(
        f"output_dir {folder} holds a run that has finished early, after step {shown(early.get('step'))} "
        f"({shown(early.get('reason'))}), so it does not go on by itself; {named}replace the run with "
        "--overwrite_output_dir."
    )


def _is_in(folder: Path, checkpoint: Path | None) -> bool:
    """Whether there is a ``checkpoint``, and it lies in the ``folder`` of a run."""
    return checkpoint is not None and checkpoint.parent.resolve() == folder.resolve()


def holds_run(folder: Path) -> bool:
    """Whether a run has written into ``folder``: run.json, the first file that it writes, or a checkpoint says so."""
    return (folder / "run.json").exists() or any(is_checkpoint(path) for path in checkpoints(folder))


def holds_result(folder: Path) -> bool:
    """Whether a whole result was published in ``folder``: one of these files comes last, and goes first."""
    return any((folder / name).exists() for name in RESULT_KEYS[:2])


def open_run_folder(run: CoreRun, source: Path | None, record: dict[str, Any]) -> Journal:
    """Make the run's folder ready and return its journal. Only the main process writes to either.

    What older runs left there is removed, except what a run needs that goes on from the checkpoint ``source``.
    ``run.json`` then contains ``record``, and says that the run is under way.
    """
    if run.strategy.is_main:
        _take(run)
        _clear(run, source, record)
        run.log.begin(run.output_dir)
    run.strategy.wait()
    journal = Journal(run.output_dir / "metrics.jsonl" if run.strategy.is_main else None)
    if run.strategy.is_main:
        run.keep_folder = partial(_keep, run, {"status": "running", **record}, journal)
    return journal


def _keep(run: CoreRun, record: dict[str, Any], journal: Journal) -> None:
    """Where the folder, or what makes it known as this run's, has vanished, make it anew and say so: what the run knows
    is more than what was in it. Raises :class:`OSError` where that cannot be."""
    folder = run.output_dir
    if (folder / "run.json").exists():
        return
    if folder.is_dir():
        what = f"run.json, and perhaps more, has vanished from {folder} since the run began; it is written anew"
    else:
        what = (
            f"{folder} has vanished since the run began, and with it its checkpoints, metrics and log; it is made anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if run.lock is not None and not (folder / LOCK).exists():
        with run.stop.whole():
            before, run.lock = run.lock, FolderLock(folder, run.say)
            before.release()
    write_report(run, record)
    journal.lost()
    if not (folder / LOG).exists():
        run.log.begin(folder)
    run.say(f"note: {what}, and the run goes on there after step {run.step}")


def _take(run: CoreRun) -> None:
    """Lock the folder for this run, until it ends. What the run has found there must still be so."""
    make_folder(run.output_dir)
    check_unused(run.output_dir, run.say)  # it may wait, which signals end
    with run.stop.whole():
        run.lock = FolderLock(run.output_dir, run.say)
    if read_report(run.output_dir) != run.earlier_report:
        raise UsageError(
            f"Another run has written to {run.output_dir} since this one began; look at what it has left there, and "
            "start again."
        )


def _clear(run: CoreRun, source: Path | None, record: dict[str, Any]) -> None:
    """Make the folder, and remove what is left of an older run unless this run goes on from ``source``.

    Even if this is stopped half-way, the folder is recognised as a run's: run.json is written first, and never removed;
    and until all has gone it says so, because what is left of the older run is not this one's to go on from.
    """
    make_folder(run.output_dir)
    remove_leftovers(run.output_dir)
    is_used = holds_run(run.output_dir)
    goes_on = source is not None and _is_in(run.output_dir, source)
    record = {"status": "running", **record}
    write_report(run, {**record, CLEARS: True} if is_used and not goes_on else record)
    if goes_on:
        for folder in checkpoints(run.output_dir):
            if step_of(folder) > run.step:  # of a future that this run does not have
                remove_folder(folder)
        for kind in (GENERATIONS, SAMPLES):
            for step, path in files_of(run.output_dir, kind):
                if step > run.step:
                    path.unlink()
        return
    if not is_used:
        return
    for folder in checkpoints(run.output_dir):
        remove_folder(folder)
    for pattern in RESULT_FILES:
        for path in run.output_dir.glob(pattern) if pattern != "run.json" else ():
            path.unlink()
    sync(run.output_dir)
    write_report(run, record)
