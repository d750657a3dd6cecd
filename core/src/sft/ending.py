"""How a run ends: its result is published, or put where there is room; run.json and the plugins hear of the end.

A run ends once. *finished*: the result is whole in its folder, and each plugin's ``sft_run_ended`` is called. *failed*
or *interrupted*: before that, and each plugin's ``sft_run_failed`` is called. All plugins are told the same, whatever
one of them does with it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.checks import PUBLISHED, RESULT_KEYS
from sft.errors import SftError, UsageError
from sft.files import publish, read_report, write_json
from sft.training.result import write_result
from sft.training.shared import SharedError

if TYPE_CHECKING:
    from sft.context import Run, Summary
    from sft.training.optimizer import Optimizer

# --- the result ---------------------------------------------------------------------------------------------


def publish_result(run: Run, optimizer: Optimizer) -> None:
    """The result of a run into its directory, where it appears complete; all processes take part.

    Where it cannot be written there it goes to another place, which the :class:`SftError` names that is then raised.
    Weights that are not finite are an :class:`SftError`, and nothing is written.
    """
    from sft.training.divergence import check_finite

    check_finite(run, optimizer)
    failure = _write(run, lambda: publish(run.output_dir, RESULT_KEYS, PUBLISHED))
    if failure is None:
        return
    where = _rescue(run)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    raise SftError(f"The result could not be written to {run.output_dir} ({failure}); {where}.")


def rescued(run: Run, optimizer: Optimizer, error: OSError) -> BaseException:
    """What to raise where ``error``, the machine's fault, ends the training: the weights by then have been put
    somewhere, if they have learned anything that no checkpoint has."""
    from sft.training import divergence
    from sft.training.checkpoint import step_of
    from sft.training.strategy import SingleProcess

    last = divergence.last_checkpoint(run)
    is_saved = run.step == (step_of(last) if last else 0)
    fails = f"The run cannot go on after step {run.step} ({_cause(error)})"
    if not isinstance(error, SharedError) and not isinstance(run.strategy, SingleProcess):
        # The others do not know of the error, and would not take part.
        left = f"{last} is what is left" if last else "what it has learned is lost, for there is no checkpoint"
        return error if is_saved else SftError(f"{fails}; {left}.")
    useless = (run.strategy.is_main and is_saved) or bool(divergence.not_finite(optimizer.parameters))
    where = None if run.strategy.largest(float(useless)) else _rescue(run)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    return error if where is None else SftError(f"{fails}; {where}.")


def without_best(run: Run, best: Path, error: UsageError) -> SftError:
    """What to raise where the ``best`` checkpoint cannot be put back at the end: it says where other weights are."""
    from sft.training.checkpoint import checkpoints, step_of

    left = [folder for folder in checkpoints(run.output_dir) if folder != best]
    if not left:
        where = "there is no other checkpoint, so nothing is left of the run"
    elif step_of(left[-1]) == run.step:
        where = f"the weights after its last step are in {left[-1]}"
    else:
        where = f"the last weights that are left are those in {left[-1]}, and the run ended after step {run.step}"
    cause = str(error).partition("; ")[0]
    return SftError(f"The run cannot end with its best model ({cause.rstrip('.')}); {where}.")


def _rescue(run: Run) -> str:
    """Write the result to the first place that takes it; a clause that says where it is now."""
    failure = None
    for find in (tempfile.gettempdir, Path.cwd, Path.home):
        holds = _Elsewhere(find)
        failure = _write(run, lambda holds=holds: holds)  # type: ignore[misc]
        if failure is None:
            return f"it is in {holds.folder} instead: make room, and move it from there"
    from sft.training.divergence import last_checkpoint

    last = last_checkpoint(run)
    left = f"{last} is what is left" if last is not None else "it is lost, for there is no checkpoint"
    return f"nor could it be written to the system's folder of temporary files, here or at home ({failure}): {left}"


class _Elsewhere:
    """A new folder in the one that ``find`` gives; it goes again if it cannot be filled."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find
        self.folder = Path()

    def __enter__(self) -> Path:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="sft-result-", dir=self._find()))
        except RuntimeError as error:  # there is no home
            raise OSError(str(error)) from error
        return self.folder

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write(run: Run, place: Callable[[], AbstractContextManager[Path]]) -> str | None:
    """Write the result into ``place``. Where the main process cannot, all processes get a reason (None: it could)."""
    failure, has_written = None, False
    try:
        if run.strategy.is_main:
            with place() as folder:
                has_written = True
                write_result(run, folder)
        else:
            write_result(run, None)
    except OSError as error:
        failure = _cause(error)
        if not has_written:  # the others wait in it
            write_result(run, None)
    if not run.strategy.largest(float(failure is not None)):
        return None
    return failure or "said by the main process"


def _cause(error: OSError) -> str:
    if error.strerror is None:
        return str(error).rstrip(".")
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


# --- run.json -----------------------------------------------------------------------------------------------


def write_report(run: Run, record: dict[str, Any]) -> None:
    """``run.json``, written once however many processes there are."""
    if run.strategy.is_main:
        write_json(run.output_dir / "run.json", record)
        run.report = record


def close_report(run: Run, error: BaseException) -> None:
    """Let ``run.json`` say that the run has failed, and of what, or was interrupted; where it has been written by this
    run, or by the processes that this one has started for it, and says that the run goes on."""
    record = run.report
    if not run.executes:
        found = read_report(run.output_dir)
        record = found if found != run.earlier_report else {}
    if record.get("status") != "running":
        return
    stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
    end = {"status": "interrupted"} if stopped else {"status": "failed", "error": sentence(error)}
    with contextlib.suppress(OSError):  # what has ended the run is what counts
        write_json(run.output_dir / "run.json", {**record, **end})
        run.report = {**record, **end}


def sentence(error: BaseException) -> str:
    """An error as one line: with its type, unless it was written for users."""
    text = str(error) if isinstance(error, (SftError, OSError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


# --- plugins ------------------------------------------------------------------------------------------------


def finish(run: Run, record: dict[str, Any], summary: Summary) -> None:
    """The run has finished: ``run.json`` says so, then all plugins are told, each with a copy of ``summary``, of which
    ``speaks`` alone is taken back: a plugin may know that another process tells the user. The first error of one of
    them is raised when all have been; that the run has finished stands."""
    write_report(run, {**record, "status": "finished", "result": summary.as_dict()})
    run.finished = True
    first: BaseException | None = None
    for name in run.plugins.implementing("sft_run_ended"):
        told = deepcopy(summary)
        try:
            run.plugins.ask(name, "sft_run_ended", run=run, summary=told)
            summary.speaks = summary.speaks and told.speaks
        except BaseException as error:  # Ctrl-C too ends one plugin's part alone
            if first is not None:
                run.say(f"note: {_sentence_of(run, name, 'sft_run_ended', error)}")
            first = first or error
    if first is not None:
        raise first


def fail(run: Run, error: BaseException) -> None:
    """The run ends with ``error`` (unless it had finished): ``run.json`` says so, then all plugins are told. What goes
    wrong in that is said, and does not take the place of ``error``."""
    if run.finished or _has_finished_elsewhere(run):
        return
    close_report(run, error)
    for name in run.plugins.implementing("sft_run_failed"):
        try:
            run.plugins.ask(name, "sft_run_failed", run=run, error=error)
        except BaseException as other:
            with contextlib.suppress(Exception):
                run.say(f"note: {_sentence_of(run, name, 'sft_run_failed', other)}")


def _sentence_of(run: Run, name: str, hook: str, error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{run.plugins.who(name)} was interrupted in {hook}."
    return sentence(error)


def _has_finished_elsewhere(run: Run) -> bool:
    """Whether the processes that this one has started have finished the run, whatever went wrong in them then."""
    found = {} if run.executes else read_report(run.output_dir)
    return found != run.earlier_report and found.get("status") == "finished"
