"""The procedure of a run, from settings to result: ``sft.run(...)``. How each part is done stands where it is imported
from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sft import assembly, checks, ending, runtime
from sft.context import Run, Summary
from sft.data.sources import find_files
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.files import read_report
from sft.models.loading import find_usable_model
from sft.models.source import find_tokenizer
from sft.progress import Printer
from sft.settings.arguments import normalise, read_file
from sft.settings.paddlenlp import listing
from sft.settings.resolve import resolve
from sft.training.checkpoint import find_checkpoint, read_state


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
    current = prepare(normalise(values), plugins, say or Printer("stdout"))
    try:
        checks.check_plugins(current)
        with current.progress:
            return current.hook.sft_launch(run=current) or execute(current)
    except BaseException as error:
        ending.fail(current, error)
        raise


def prepare(values: Mapping[str, Any], extra: Iterable[type], say: Callable[[str], None]) -> Run:
    """Resolve plugins and settings and run every check that is instant; nothing heavy is imported."""
    settings, active, without_effect = resolve(values, extra)
    current = Run(settings, active, say, values)
    for clause in active.replaced:
        say(f"note: {clause}")
    given = settings.flat()
    for name in ("model_name_or_path", "dataset_name_or_path", "output_dir"):
        if not given[name]:
            raise UsageError(f"{name} is not set; add --{name} VALUE or put it into the settings file.")
    current.without_effect = [*without_effect, *checks.check_settings(settings)]
    checks.check_output(current)
    current.earlier_report = read_report(current.output_dir)
    active.hook.sft_check(run=current)
    return current


def execute(run: Run) -> Summary:
    """Data, model, training, result. The run directory appears only when training is about to begin."""
    with runtime.restored(run.settings.training.device):
        return _execute(run)


def _execute(run: Run) -> Summary:
    started, run.executes = time.time(), True
    if run.without_effect:
        run.say(listing(run.without_effect))
    dataset = Path(str(run.settings.data.dataset_name_or_path)).expanduser()
    train_files = find_files(dataset, "train") if run.settings.training.do_train else []
    dev_files = find_files(dataset, "dev")
    runtime.require_paddle()
    model = run.settings.model
    place, architecture = find_usable_model(str(model.model_name_or_path), model.allow_pickle)
    source = find_checkpoint(run.settings.training.resume_from_checkpoint, run.output_dir)
    state = read_state(source) if source is not None else None
    if source is not None and state is not None:
        checks.check_same_plugins(run, source, state)
    date = datetime.fromisoformat(state["date"]) if state is not None else None
    named = model.tokenizer_name_or_path
    run.tokenizer = Tokenizer(find_tokenizer(named) if named else place.path, date, run.settings.data.chat_template)
    assembly.note_unread(run, dataset, [*train_files, *dev_files])
    run.resumes = state is not None
    assembly.read_data(run, train_files, dev_files, place.path, architecture)
    run.say(runtime.prepare())
    assembly.load_model(run, place)
    if not run.settings.training.do_train:
        return _only_evaluate(run, source, state, started)
    optimizer = assembly.make_optimizer(run)
    schedule = assembly.make_schedule(run)
    if source is not None and state is not None:
        checks.check_resumable(run, schedule, source, state)

    from sft.exporting import check_export
    from sft.training import checkpoint
    from sft.training.loop import train
    from sft.training.progress import Display

    if source is not None and state is not None:
        checkpoint.load(run, optimizer, source, state)
    check_export(run)
    record = assembly.describe(run)
    journal = assembly.open_journal(run, source, record)
    if source is not None and state is not None:
        journal.rewind(state["journal"], source.parent / "metrics.jsonl")
        run.before, run.evaluation, run.best = state["before"], state["evaluation"], assembly.best_so_far(run, state)
        run.say(f"resuming from {source} after step {state['step']}")
    else:
        run.before = assembly.before_or_after(run, 0, 0.0, journal)
    run.hook.sft_run_started(run=run)
    if run.settings.training.save_strategy != "no":
        checkpoint.check_plugin_state(run)
    start = run.step = state["step"] if state is not None else 0
    display = Display(schedule.total_steps, start, run.progress)
    run.plugins.manager.register(display)
    try:
        steps, epochs = train(run, optimizer, schedule, journal, display, state)
    except OSError as error:
        raise ending.rescued(run, optimizer, error) from error
    finally:
        display.close()
    best = assembly.load_best(run) if run.settings.training.load_best_model_at_end else None
    ending.publish_result(run, optimizer)  # before anything else can go wrong
    after = assembly.before_or_after(run, best or steps, epochs, journal)
    summary = assembly.summarise(run, journal, steps, epochs, after, time.time() - started)
    ending.finish(run, record, summary)
    return summary


def _only_evaluate(run: Run, source: Path | None, state: dict[str, Any] | None, started: float) -> Summary:
    """``do_train false``: measure the model as it is, or as it was in a checkpoint; no weights are written."""
    from sft.training import checkpoint

    step, epoch = 0, 0.0
    if source is not None and state is not None:
        checks.check_same_base(run, source)
        checkpoint.load_model(run, source, state)
        run.step = step = state["step"]
        epoch = state["epoch"]
        run.say(f"measuring {source}")
    record = assembly.describe(run)
    journal = assembly.open_journal(run, None, record)
    run.model.eval()
    run.before = assembly.before_or_after(run, step, epoch, journal)
    summary = assembly.summarise(run, journal, step, epoch, run.before, time.time() - started)
    ending.finish(run, record, summary)
    return summary
