"""How a run ends: ``run.json`` and all plugins hear of it.

A run ends once. It has *finished* when the whole result is in its folder; then each plugin's ``sft_run_ended`` is
called. If it ends before that it has *failed*, or was *interrupted*, and each plugin's ``sft_run_failed`` is called.
All plugins are told the same, even if one of them raises an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sft.errors import SignalError
from sft.training.report import own_report, sentence, write_end, write_report

if TYPE_CHECKING:
    from sft.context import CoreRun, Summary


def finish(run: CoreRun, record: dict[str, Any], summary: Summary, leave_report: Callable[[CoreRun], None]) -> None:
    """The run has finished: write that to ``run.json``, let ``leave_report`` write what people read, then tell every
    plugin.

    Each gets a copy of ``summary``. Only ``speaks`` is read back from it, because a plugin may know that another
    process tells the user. If plugins raise errors, the first one is raised once all have been told; the run stays
    finished. So it does at a signal, which waits until they have been told."""
    run.stop.waits_for("the run has finished, and its plugins hear of it first")
    write_report(run, {**record, "status": "finished", "result": summary.as_dict()})
    run.progress.note(f"the run has finished: {summary.steps} steps in {summary.seconds:.1f} s")
    run.finished = True
    leave_report(run)
    first: BaseException | None = None
    for name in run.plugins.implementing("sft_run_ended"):
        told = deepcopy(summary)
        try:
            run.plugins.ask(name, "sft_run_ended", run=run, summary=told)
            summary.speaks = summary.speaks and told.speaks
        except BaseException as error:  # even Ctrl-C ends the part of one plugin only
            if first is not None:
                run.say(f"note: {_sentence_of(run, name, 'sft_run_ended', error)}")
            first = first or error
    if first is not None:
        raise first
    if run.stop.asked:
        raise SignalError(run.stop.asked, "after the run had finished")


def fail(run: CoreRun, error: BaseException, leave_report: Callable[[CoreRun], None]) -> None:
    """The run ends with ``error``, unless it had finished, here or in the processes that this one has started for it:
    write that to ``run.json``, let ``leave_report`` write what people read, then tell every plugin.

    If a plugin raises an error here, the user is told of it, and ``error`` remains the run's error."""
    if run.finished or own_report(run).get("status") == "finished":
        return
    write_end(run, error)
    leave_report(run)
    run.release_lock()  # this process may end before it comes to any other end
    for name in run.plugins.implementing("sft_run_failed"):
        try:
            run.plugins.ask(name, "sft_run_failed", run=run, error=error)
        except BaseException as other:
            with contextlib.suppress(Exception):
                run.say(f"note: {_sentence_of(run, name, 'sft_run_failed', other)}")


def _sentence_of(run: CoreRun, name: str, hook: str, error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{run.plugins.who(name)} was interrupted in {hook}."
    return sentence(error)
