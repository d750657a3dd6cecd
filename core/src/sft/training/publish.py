"""Publishing the result of a run in its folder, or where there is room: what has been learned must not be lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import SftError
from sft.files import publish
from sft.training.checkpoint_folder import step_of
from sft.training.divergence import check_finite, last_checkpoint, not_finite
from sft.training.result import PUBLISHED, RESULT_KEYS, write_result
from sft.training.shared import SharedError
from sft.training.strategy import SingleProcess

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.training.optimizer import Optimizer


def publish_result(run: CoreRun, optimizer: Optimizer) -> None:
    """The result of a run into its directory, where it appears complete; all processes take part.

    Where it cannot be written there it goes to another place, which the :class:`SftError` names that is then raised.
    Weights that are not finite are an :class:`SftError`, and nothing is written.
    """
    check_finite(run, optimizer)
    failure = _write(run, lambda: publish(run.output_dir, RESULT_KEYS, PUBLISHED))
    if failure is None:
        return
    where = _rescue(run)
    if not run.strategy.is_main:
        run.strategy.wait()  # the main process knows what to say, and ends the others with it
    raise SftError(f"The result could not be written to {run.output_dir} ({failure}); {where}.")


def rescued(run: CoreRun, optimizer: Optimizer, error: OSError) -> BaseException:
    """What to raise where ``error``, the machine's fault, ends the training: the weights by then have been put
    somewhere, if they have learned anything that no checkpoint has."""
    last = last_checkpoint(run)
    is_saved = run.step == (step_of(last) if last else 0)
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


def _rescue(run: CoreRun) -> str:
    """Write the result to the first place that takes it; a clause that says where it is now."""
    failure = None
    for find in (tempfile.gettempdir, Path.cwd, Path.home):
        holds = _Elsewhere(find)
        failure = _write(run, lambda holds=holds: holds)  # type: ignore[misc]
        if failure is None:
            return f"it is in {holds.folder} instead: make room, and move it from there"
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


def _write(run: CoreRun, place: Callable[[], AbstractContextManager[Path]]) -> str | None:
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
