"""The procedure of a run, from settings to result: ``sft.run(...)``. It is meant to be read as one page; each part
is in the module from which it is imported."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sft import arithmetic, deterministic, runtime
from sft.context import CoreRun, Summary
from sft.data.batches import PaddedCollator, Schedule
from sft.data.reading import read_data
from sft.data.sets import open_sets
from sft.errors import UsageError
from sft.files import read_report
from sft.foreign_text import shown
from sft.models.loading import open_model
from sft.models.source import find_tokenizer
from sft.models.vocabulary import grown_tokenizer
from sft.plugins.discovery import entries, left_out
from sft.resolve import resolve
from sft.run_report.written import leave_report
from sft.settings.checks import check_plugins, check_settings
from sft.settings.files import read_file
from sft.settings.paddlenlp import listing
from sft.settings.reading import normalise
from sft.training.checkpoint_folder import Checkpoint, is_auto, read_checkpoint
from sft.training.ending import fail, finish
from sft.training.first_rows import keep_rows
from sft.training.out_of_memory import is_memory, out_of_memory
from sft.training.report import describe, summarise, write_end
from sft.training.resume_checks import (
    check_agreed,
    check_alike,
    check_arithmetic,
    check_beginning,
    check_same_base,
    check_same_plugins,
)
from sft.training.run_folder import check_output, open_run_folder
from sft.training.skipped_records import list_skipped
from sft.training.steps_file import NAME as STEPS
from sft.voice import voice_of

if TYPE_CHECKING:
    from sft.optimizer import Optimizer
    from sft.training.journal import Journal
    from sft.training.rates import Rates
    from sft.training.wishes import Wishes

T = TypeVar("T")


def run(
    settings: Mapping[str, Any] | str | os.PathLike[str],
    *,
    plugins: Iterable[type] = (),
    say: Callable[[str], None] | None = None,
) -> Summary:
    """Fine-tune a model: what ``sft run`` does, with settings by name (or the path of a settings file).

    ``plugins`` adds plugin classes that no installed distribution provides. ``say`` receives the lines that the
    command line prints (by default they are printed). Raises :class:`sft.UsageError` for everything that the
    command line answers with exit code 2, before anything has been written.
    """
    values = read_file(Path(settings)) if isinstance(settings, (str, os.PathLike)) else settings
    return carry_out(prepare_run(normalise(values), plugins, say))


def carry_out(current: CoreRun) -> Summary:
    """The run that :func:`prepare_run` has made ready."""
    return carried_out(
        current, lambda: current.hook.sft_launch(run=current) or execute(current, _train_or_measure), leave_report
    )


def carried_out(current: CoreRun, work: Callable[[], T], leave: Callable[[CoreRun], None]) -> T:
    """What ``work`` makes of a run that has been prepared. It hears signals, and whatever ends it is told to all;
    ``leave`` then writes what people read."""
    with current.stop.heard(partial(write_end, current)):
        try:
            check_plugins(current.plugins)
            with current.progress:
                return work()
        except BaseException as error:
            told = out_of_memory(current, error) if is_memory(error) else current.stop.instead_of(error)
            fail(current, told, leave)
            if told is error:
                raise
            raise told from error
        finally:
            current.stop.waiting = True  # nothing may come between the end and the lock's release
            current.release_lock()


def prepare_run(values: Mapping[str, Any], extra: Iterable[type], say: Callable[[str], None] | None = None) -> CoreRun:
    """Resolve plugins and settings and run every check that is instant; nothing heavy is imported."""
    entries.cache_clear()  # what was installed since the last run counts
    settings, active, without_effect = resolve(values, extra)
    say = voice_of(say, settings.training.level, settings.training.json_logs)
    current = CoreRun(settings, active, say, values)
    for clause in (*active.replaced, left_out()):
        if clause is not None:
            say(f"note: {clause}")
    given = settings.flat()
    for name in ("model_name_or_path", "dataset_name_or_path", "output_dir"):
        if not given[name]:
            raise UsageError(f"{name} is not set; add --{name} VALUE or put it into the settings file.")
    current.without_effect = [*without_effect, *check_settings(settings, active)]
    check_output(current)
    current.earlier_report = read_report(current.output_dir)
    active.hook.sft_check(run=current)
    return current


def execute(run: CoreRun, work: Callable[[CoreRun, Checkpoint | None, float], T]) -> T:
    """Data and model, then ``work``, which is given the checkpoint that the run goes on from, and when it began."""
    started, run.executes = time.monotonic(), True
    if run.without_effect:
        lines = listing(run.without_effect)
        run.progress.tell("note", {"text": "\n".join(lines)}, lines, "warning")
    with made_ready(run) as resumed:
        return work(run, resumed, started)


@contextlib.contextmanager
def made_ready(run: CoreRun) -> Iterator[Checkpoint | None]:
    """The data and the model of a run, ready to compute, and the checkpoint that it goes on from. Afterwards paddle has
    its device of before."""
    training = run.settings.training
    with runtime.restored(training.device), deterministic.repeatable(training.deterministic):
        resumed = _read_inputs(run)
        run.say(runtime.prepare())
        _set_up_model(run)
        check_agreed(run)
        yield resumed


def _train_or_measure(run: CoreRun, resumed: Checkpoint | None, started: float) -> Summary:
    """Training and its result, or the model measured. The run directory appears only when that is about to begin."""
    return (_train if run.settings.training.do_train else _only_evaluate)(run, resumed, started)


def _read_inputs(run: CoreRun) -> Checkpoint | None:
    """Open the model, find the checkpoint that the run goes on from, if any, and read the data, all without paddle."""
    settings = run.settings
    trains = settings.training.do_train
    sets = open_sets(settings.data, run.plugins, run.progress, run.files_of, trains=trains)
    runtime.require_paddle()
    source = open_model(settings.model.place, run.plugins, settings.model.allow_pickle, run)
    resumed = read_checkpoint(settings.training.resume_from_checkpoint, run.output_dir, run.progress)
    if resumed is not None:
        check_same_plugins(run, resumed)
    run.resumes, run.step = resumed is not None, resumed.state["step"] if resumed is not None else 0
    date = datetime.fromisoformat(resumed.state["date"]) if resumed is not None else run.date
    named = settings.model.tokenizer_name_or_path
    folder = find_tokenizer(named) if named else source.folder
    run.tokenizer = grown_tokenizer(settings, source, folder, date, run.say)
    run.train_data, run.dev_data, run.samples, run.questions, run.places = read_data(
        settings, run.plugins, run.tokenizer, run.progress, sets, source.folder, source.architecture
    )
    return resumed


def _set_up_model(run: CoreRun) -> None:
    """Device, precision, collator, processes and the model itself."""
    from sft.models.setup import set_up
    from sft.training.objective import objective_of
    from sft.training.precision import choose_precision
    from sft.training.strategy import SingleProcess

    if run.settings.training.device is not None:
        runtime.use_device(run.settings.training.device)
    run.arithmetic = arithmetic.in_effect()
    if run.settings.training.deterministic:
        deterministic.switch_on(run.arithmetic, run.settings.training.deterministic == "strict")
        run.arithmetic |= deterministic.flags_in_effect()
    settings = run.settings
    run.precision = choose_precision(settings.training, settings.given, run.exports_adapter, run.say)
    run.collator = run.hook.sft_collator(run=run) or PaddedCollator(run.tokenizer.pad_id)
    run.strategy = run.hook.sft_parallel_strategy(run=run) or SingleProcess()
    set_up(run)
    run.objective = objective_of(run)
    check_alike(run)


class Begun(NamedTuple):
    """Training that is about to begin, or to go on."""

    schedule: Schedule
    optimizer: Optimizer
    rates: Rates
    journal: Journal
    wishes: Wishes
    record: dict[str, Any]
    """What ``run.json`` says of it."""


def begin(
    run: CoreRun, resumed: Checkpoint | None, check: Callable[[CoreRun, Schedule, Checkpoint | None], None]
) -> Begun:
    """Put everything in place for the first step, or for the one after a checkpoint, which ``check`` may refuse."""
    from sft.training import best, checkpoint
    from sft.training.export_checks import check_export
    from sft.training.groups import make_optimizer
    from sft.training.rates import make_rates
    from sft.training.wishes import Wishes

    assert run.train_data is not None
    schedule = Schedule.of(run.settings.training, run.train_data, run.collator, run.strategy.data_world)
    optimizer, rates = make_optimizer(run), make_rates(run, schedule.total_steps)
    check(run, schedule, resumed)
    if resumed is not None:
        checkpoint.restore(run, optimizer, resumed.folder, resumed.state)
    check_export(run)
    record = describe(run, schedule)
    journal = open_run_folder(run, resumed.folder if resumed is not None else None, record)
    wishes = Wishes(run)
    if resumed is not None:
        state, before = resumed.state, resumed.folder.parent
        changed = (
            journal.rewind(state, before / "metrics.jsonl"),
            journal.steps.rewind(run.step, state.get("steps"), before / STEPS),
        )
        run.taken = run.step - journal.skipped_in_a_row
        for clause in filter(None, changed):
            run.say(f"note: {clause}")
        keep_rows(run, before)
        run.before, run.evaluation, run.best = state["before"], state["evaluation"], best.best_so_far(run, state)
        run.say(f"resuming from {resumed.folder} after step {run.step}")
    return Begun(schedule, optimizer, rates, journal, wishes, record)


def _train(run: CoreRun, resumed: Checkpoint | None, started: float) -> Summary:
    """Train the model that has been set up, write the result, and measure the model before and after."""
    from sft.training import best, checkpoint
    from sft.training.evaluation import before_or_after
    from sft.training.loop import check_stop, train
    from sft.training.outlook import tell_plan
    from sft.training.pace import pauses_of
    from sft.training.progress import Display
    from sft.training.publish import publish_result, rescued

    training = run.settings.training
    schedule, optimizer, rates, journal, wishes, record = begin(run, resumed, check_beginning)
    list_skipped(run, resumed.folder.parent if resumed is not None else None)
    if run.strategy.is_main:
        tell_plan(run, schedule)
    if resumed is not None:
        _keep_early_end(run, resumed.state.get("stopped_early"))
    else:
        run.before = before_or_after(run, 0, 0.0, journal)
    run.hook.sft_run_started(run=run)
    if training.save_strategy != "no":
        checkpoint.check_plugin_state(run)
    measured = run.evaluation.get("eval_seconds")
    display = Display(schedule.total_steps, run.step, run.progress, pauses_of(run, schedule), measured)
    run.plugins.manager.register(display)
    try:
        steps, epochs = train(
            run, optimizer, rates, schedule, journal, display, wishes, resumed.state if resumed is not None else None
        )
    except OSError as error:
        raise rescued(run, optimizer, error) from error
    finally:
        display.close()
        journal.steps.close()
    best_step = best.load_best(run, optimizer) if training.load_best_model_at_end else None
    run.stop.waits_for("writing the result first")
    publish_result(run, optimizer)  # before anything else can go wrong
    wishes.ended()
    check_stop(run, "after the result was written")
    after = before_or_after(run, best_step or steps, epochs, journal)
    summary = summarise(run, journal, steps, epochs, after, time.monotonic() - started)
    finish(run, record, summary, leave_report)
    return summary


def _keep_early_end(run: CoreRun, early: dict[str, Any] | None) -> None:
    """A checkpoint that was written as the run ended early ends it again; one that the user names goes on."""
    if early is None:
        return
    was = f"the run ended early after step {early['step']} ({shown(early['reason'])})"
    if is_auto(run.settings.training.resume_from_checkpoint):
        run.stopped_early = early
        run.say(f"{was}, so no step follows")
    else:
        run.say(f"note: {was}, and now goes on, for its checkpoint is named")


def _only_evaluate(run: CoreRun, resumed: Checkpoint | None, started: float) -> Summary:
    """``do_train false``: measure the model as it is, or as it was in a checkpoint; no weights are written."""
    from sft.training import checkpoint
    from sft.training.evaluation import before_or_after
    from sft.training.outlook import tell_plan

    step, epoch = 0, 0.0
    if resumed is not None:
        check_same_base(run, resumed.folder)
        checkpoint.restore_model(run, resumed.folder, resumed.state, "measure")
        check_arithmetic(run, resumed.folder.name, resumed.state)
        step, epoch = run.step, resumed.state["epoch"]
        run.say(f"measuring {resumed.folder}")
    record = describe(run, None)
    journal = open_run_folder(run, None, record)
    list_skipped(run, None)
    if run.strategy.is_main:
        tell_plan(run, None)
    run.model.eval()
    run.before = before_or_after(run, step, epoch, journal)
    summary = summarise(run, journal, step, epoch, run.before, time.monotonic() - started)
    finish(run, record, summary, leave_report)
    return summary
