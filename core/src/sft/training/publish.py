"""Publishing the result of a run in its folder, or wherever there is room, so that what was learned is not lost."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import SftError
from sft.files import discard, publish
from sft.training.checkpoint_folder import saved_step
from sft.training.divergence import check_finite, last_checkpoint, not_finite
from sft.training.result import PUBLISHED, RESULT_KEYS, write_result
from sft.training.shared import SharedError
from sft.training.strategy import SingleProcess

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.optimizer import Optimizer


def publish_result(run: CoreRun, optimizer: Optimizer) -> None:
    """Put the result of a run into its folder, where it appears complete. All processes take part.

    If it cannot be written there, it is written to another place, and an :class:`SftError` names that place. If weights
    are not finite, nothing is written and an :class:`SftError` is raised.
    """
    check_finite(run, optimizer)
    run.check_lock()

    def place() -> AbstractContextManager[Path]:
        run.keep_folder()
        return publish(run.output_dir, RESULT_KEYS, PUBLISHED)

    failure = _write(run, place)
    if failure is None:
        return
    where = _rescue(run)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    raise SftError(f"The result could not be written to {run.output_dir} ({failure}); {where}.")


def rescued(run: CoreRun, optimizer: Optimizer, error: OSError) -> BaseException:
    """The error to raise when ``error``, one of the machine, ends the training. By then the weights have been saved
    somewhere, unless a checkpoint has them already."""
    if run.stop.instead_of(error) is not error:
        return run.stop.instead_of(error)
    last = last_checkpoint(run)
    is_saved = run.step == (saved_step(last) if last else 0)
    fails = f"The run cannot go on after step {run.step} ({_cause(error)})"
    if not isinstance(error, SharedError) and type(run.strategy) is not SingleProcess:
        # The others do not know of the error, and would not take part.
        left = f"{last} is what is left" if last else "what it has learned is lost, for there is no checkpoint"
        return error if is_saved else SftError(f"{fails}; {left}.")
    useless = (run.strategy.is_main and is_saved) or bool(not_finite(optimizer.parameters))
    where = None if run.strategy.largest(float(useless)) else _rescue(run)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    return error if where is None else SftError(f"{fails}; {where}.")


def kept_beside(run: CoreRun, optimizer: Optimizer) -> Path | None:
    """Write the model as it is into a new folder in that of the run: that folder, or None if it cannot be, or weights
    are not finite. All processes take part, and the main one knows the folder."""
    if run.strategy.largest(float(bool(not_finite(optimizer.parameters)))):
        return None
    beside = _Elsewhere(lambda: run.output_dir)
    return beside.folder if _write(run, beside) is None else None


def _rescue(run: CoreRun) -> str:
    """Write the result to the first place that has room for it, and return a clause that says where it is."""
    failure = None
    for find in (tempfile.gettempdir, Path.cwd, Path.home):
        holds = _Elsewhere(find)
        failure = _write(run, holds)
        if failure is None:
            return f"it is in {holds.folder} instead: make room, and move it from there"
    last = last_checkpoint(run)
    left = f"{last} is what is left" if last is not None else "it is lost, for there is no checkpoint"
    return f"nor could it be written to the system's folder of temporary files, here or at home ({failure}): {left}"


class _Elsewhere:
    """A new folder in the one that ``find`` returns, where the result appears complete; it is removed again if it
    cannot be filled."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find
        self.folder = Path()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Path]:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="sft-result-", dir=self._find()))
        except RuntimeError as error:  # there is no home
            raise OSError(str(error)) from error
        try:
            with publish(self.folder, RESULT_KEYS) as staging:
                yield staging
        except BaseException:
            discard(self.folder)
            raise


def _write(run: CoreRun, place: Callable[[], AbstractContextManager[Path]]) -> str | None:
    """Write the result into ``place``. If the main process fails, every process returns a reason; otherwise None."""
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
