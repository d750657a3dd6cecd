"""The procedure: steps of a run computed again, from the nearest checkpoints, by the run's own loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.errors import SftError, UsageError
from sft.fine_tune import begin, carried_out, execute
from sft.replay.differences import check_base, differences, legs_between, other_data, other_processes
from sft.replay.opened import Leg, OpenedRun
from sft.replay.value import Replay, ReplayedStep
from sft.training.checkpoint_folder import DamagedError
from sft.training.ending import fail
from sft.training.steps_file import read_steps

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Schedule
    from sft.data.tokenizer import Tokenizer
    from sft.training.checkpoint_folder import Checkpoint


class _Stretch(NamedTuple):
    """Steps that are computed again in one go."""

    start: int
    """The step of the checkpoint that they go on from; 0: the beginning of the run."""
    leg: Leg
    wanted: list[int]


class _Found(NamedTuple):
    steps: list[ReplayedStep]
    differences: list[str]
    minimises: list[str]
    tokenizer: Tokenizer


def replay(opened: OpenedRun, steps: Iterable[int], say: Callable[[str], None]) -> Replay:
    """Compute ``steps`` again. ``say`` receives what the run says on the way, and notes.

    Steps between two checkpoints are computed in one go, from the one before them; where that is damaged, from an
    earlier one. Raises :class:`UsageError` for steps that the run has not computed, where its base model, or a plugin
    that it needs, is not there, and for what a resume refuses; but other data are among the differences.
    """
    waiting = sorted(set(steps))
    opened.check(waiting)
    starts = dict(opened.starts)
    found: list[_Found] = []
    begun: list[int] = []
    computed = 0
    while waiting:
        stretch = _first_stretch(opened, starts, waiting)
        try:
            found.append(_computed(opened, stretch, starts.get(stretch.start), say))
        except DamagedError as error:
            del starts[stretch.start]
            say(f"note: {str(error).partition('; ')[0]}; an earlier one is taken")
            continue
        waiting = waiting[len(stretch.wanted) :]
        begun.append(stretch.start)
        computed += stretch.wanted[-1] - stretch.start
    return Replay(
        str(opened.folder),
        [step for one in found for step in one.steps],
        computed,
        begun,
        list(dict.fromkeys(clause for one in found for clause in one.differences)),
        list(dict.fromkeys(name for one in found for name in one.minimises)),
        found[-1].tokenizer if found else None,
    )


def _first_stretch(opened: OpenedRun, starts: Mapping[int, Path], waiting: list[int]) -> _Stretch:
    """The first of the steps that are ``waiting``, and those after it that are nearest to the same checkpoint."""

    def nearest(step: int) -> int:
        return max((one for one in starts if one < step), default=0)

    start, leg = nearest(waiting[0]), opened.leg(waiting[0])
    wanted = [step for step in waiting if nearest(step) == start and opened.leg(step).after == leg.after]
    return _Stretch(start, leg, wanted)


def _computed(opened: OpenedRun, stretch: _Stretch, start: Path | None, say: Callable[[str], None]) -> _Found:
    with tempfile.TemporaryDirectory(prefix="sft-replay-", ignore_cleanup_errors=True) as folder:
        run, changed = opened.prepared(stretch.leg, start, Path(folder) / "run", say)
        found = carried_out(run, lambda: execute(run, partial(_observed, opened, stretch)), _leave_nothing)
        settings = [f"settings: {', '.join(changed)}"] if changed else []
        return found._replace(differences=[*settings, *found.differences])


def _observed(opened: OpenedRun, stretch: _Stretch, run: CoreRun, resumed: Checkpoint | None, began: float) -> _Found:
    """Let the run train to the last step of ``stretch``, and look at those that are wanted."""
    from sft.replay.observing import Watched, laid_out, places_of, records_of
    from sft.training.loop import train
    from sft.training.progress import Display

    last = stretch.wanted[-1]

    def check(run: CoreRun, schedule: Schedule, resumed: Checkpoint | None) -> None:
        if last > schedule.total_steps:
            raise UsageError(
                f"{opened.folder} ends at step {schedule.total_steps:,}, and step {last:,} is beyond it; give "
                "an earlier one."
            )
        check_base(run, opened, resumed)

    schedule, optimizer, rates, journal, wishes, record = begin(run, resumed, check)
    minimises = [name for hook in ("sft_objective", "sft_token_loss") for name in run.plugins.implementing(hook)]
    run.objective = watched = Watched(run, set(stretch.wanted))
    run.hook.sft_run_started(run=run)
    display = Display(last, run.step, run.progress)
    run.plugins.manager.register(display)
    state = resumed.state if resumed is not None else None
    try:
        train(run, optimizer, rates, schedule, journal, display, wishes, state, until=last)
    except SftError:
        if not _ended_there(run, last):  # the run itself has ended with that step
            raise
    finally:
        display.close()
        journal.steps.close()
    figures = read_steps(run.output_dir)
    if figures is None or len(figures) < last:
        reason = (run.stopped_early or {}).get("reason", "nobody says why")
        raise SftError(f"The replay has ended after step {run.step}, before step {last} ({reason}).")
    seen = [watched.seen[step] for step in stretch.wanted]
    named = places_of(seen, run.places)
    steps = [
        ReplayedStep(
            one.at.number,
            one.at.epoch,
            float(figures.loss[one.at.number - 1]),
            float(figures.grad_norm[one.at.number - 1]),
            opened.recorded(one.at.number),
            [row for row, _ in laid_out(one)],
            records_of(one, named[one.at.number]),
        )
        for one in seen
    ]
    clauses = [
        *other_processes(stretch.leg, opened),
        *differences(opened, stretch.leg, record),
        *other_data(run, opened, schedule, resumed),
        *legs_between(opened, stretch.start, stretch.leg),
    ]
    # Plugins hear of the one end that there is.
    fail(run, _OverError("the replay has computed what was asked for"), _leave_nothing)
    return _Found(steps, clauses, minimises, run.tokenizer)


def _leave_nothing(run: CoreRun) -> None:
    """The folder of a replay goes with it."""


def _ended_there(run: CoreRun, step: int) -> bool:
    """Whether step ``step`` is the last one that was computed, and is not finite, with which a run ends."""
    figures: Any = read_steps(run.output_dir)
    return figures is not None and len(figures) == step and not bool(figures.taken[-1])


class _OverError(SftError):
    """A replay is over, and its run with it: it has no result."""
