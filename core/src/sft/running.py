"""A run, from settings to result: ``sft.run(...)`` and the :class:`Run` that hooks receive."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from sft import assembly, checks, ending, runtime
from sft.data.batches import Data
from sft.data.encoding import Encoded, Question
from sft.data.sources import find_files
from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.files import read_report, save_tensors, write_json
from sft.models.loading import find_usable_model
from sft.models.source import find_tokenizer
from sft.plugins.registry import Plugins
from sft.progress import Printer, Progress
from sft.seams import DataCollator, ParallelStrategy
from sft.settings.arguments import Settings, normalise, read_file
from sft.settings.paddlenlp import listing
from sft.settings.resolve import resolve
from sft.training.checkpoint import find_checkpoint, read_state
from sft.training.precision import Precision


@dataclass
class Summary:
    """What a run did and learned, in numbers. Losses are nats per target token.

    Attributes:
        rows: Rows that were trained: records, or packs of several.
        skipped_steps: Steps that overflowed in float16 and changed nothing.
        samples: ``prompt``, ``before``, ``after`` and the ``reference`` answer of each sample prompt.
        speaks: Whether this process tells the user: of several that share a run, one.
    """

    output_dir: Path
    steps: int
    epochs: float
    seconds: float
    train_loss_first: float | None
    train_loss_last: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    trainable_parameters: int
    total_parameters: int
    tokens: int
    target_tokens: int
    padding_tokens: int
    rows: int
    skipped_steps: int
    peak_memory_mib: int
    data: dict[str, dict[str, int]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    speaks: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values, as ``run.json`` has it."""
        values = {**asdict(self), "output_dir": str(self.output_dir)}
        del values["speaks"]
        return values


class Run:
    """One run. Plugins find here what they need; two runs in one process share nothing.

    Attributes:
        model: The paddle model, from ``sft_adapt_model`` on.
        source: Where the model came from: ``folder``, ``values`` (config.json), ``family``, ``config``.
        base_fingerprint: Tells the weights that an exported adapter belongs to; see ``models/fingerprint.py``.
        resumes: Whether a checkpoint is about to be put back: what the model begins with will be replaced by what is in
            it.
        tokenizer: From ``sft_record_format`` on.
        train_data: The encoded records, from ``sft_collator`` on; None where nothing is trained.
        dev_data: Likewise; None where there are none, or none are used.
        collator: What ``sft_collator`` gave, from ``sft_parallel_strategy`` on.
        strategy: The processes of the run (:class:`sft.ParallelStrategy`), from ``sft_model_config`` on.
        precision: The dtypes of the run, from ``sft_collator`` on.
        arithmetic: On what the last bits of its numbers depend, as run.json has it.
        sizes: Trainable parameters and all of them, of the whole model, as numbers of values.
        settings: The resolved settings: ``model``, ``data``, ``generation``, ``training``, and ``options`` of plugins
            by name; ``flat()`` is all of them by their own names.
        given: The settings by name as they came, ``plugin`` among them.
        without_effect: Settings that were given and do nothing here, with the reason.
        plugins: The active plugins: ``names``, ``provider(hook)``, ``origin(name)``.
        hook: Calls hooks, those too that plugins publish: ``run.hook.NAME(argument=…)``.
        progress: Shows the user how far long work is: ``for item in run.progress.over(items, "reading", "files")``.
        before: What was measured before training.
        evaluation: The record of the last evaluation, as ``sft_evaluated`` has it.
        best: The record of the best evaluation that has a checkpoint (``load_best_model_at_end``).
        step: The last optimizer step that was made, from 1.
        executes: Whether the run is done in this process, not in others that are started for it.
        finished: Whether the run has finished; nothing that goes wrong now changes that.
        report: What this process has written to run.json.
        earlier_report: What run.json said before this run.
        samples: What is answered before and after training (``num_samples``).
        questions: What is answered in each evaluation (``eval_with_do_generation``).
    """

    model: Any
    source: Any
    base_fingerprint: str
    resumes = False
    tokenizer: Tokenizer
    train_data: Data | None = None
    dev_data: Encoded | None = None
    collator: DataCollator
    strategy: ParallelStrategy
    precision: Precision
    arithmetic: dict[str, Any]
    sizes: tuple[int, int]

    def __init__(
        self, settings: Settings, plugins: Plugins, say: Callable[[str], None], given: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.given = dict(given or {})
        self.without_effect: list[tuple[str, str]] = []
        self.plugins = plugins
        self.hook = plugins.hook
        self.progress = Progress(say, bars=not settings.training.disable_tqdm)
        self.before: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.step = 0
        self.executes = False
        self.finished = False
        self.report: dict[str, Any] = {}
        self.earlier_report: dict[str, Any] = {}
        self.samples: list[Question] = []
        self.questions: list[Question] = []

    def __getattr__(self, name: str) -> Any:
        if name in Run.__annotations__:
            text = f"run.{name} is not there yet; help(sft.Run) says from which hook on it is"
        else:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=self)

    @property
    def say(self) -> Callable[[str], None]:
        """Tells the user one line. Setting it replaces the voice of :attr:`progress` too."""
        return self.progress.say

    @say.setter
    def say(self, say: Callable[[str], None]) -> None:
        self.progress.say = say

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the run's seed and ``name`` alone, not on what was drawn before."""
        return np.random.default_rng([self.settings.training.seed, zlib.crc32(name.encode())])

    @property
    def output_dir(self) -> Path:
        """The run directory; it is made before the first evaluation, or else before ``sft_run_started``."""
        return Path(str(self.settings.training.output_dir)).expanduser()

    @property
    def exports_adapter(self) -> bool:
        """Whether the result is an adapter; if not, it is the whole model."""
        return self.plugins.provider("sft_export_adapter") is not None

    def shaping(self) -> dict[str, dict[str, Any]]:
        """The options of the plugins that change what is learned, by plugin: what a resumed run must have too."""
        options = self.settings.options
        return {name: asdict(options[name]) if name in options else {} for name in self.plugins.shaping()}

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return self.settings.training.eval_steps or self.settings.training.logging_steps

    def write_result(self, folder: Path | None) -> None:
        """What a user loads afterwards: the adapter in PEFT layout or the whole model, and the tokenizer. All processes
        of a run take part, and the main one writes; with None it only takes part."""
        from sft.inference.adapter import about_base
        from sft.models.saving import write_model

        if not self.exports_adapter:
            parameters = list(self.strategy.parameters(self.model))
            whole = self.progress.over(self.strategy.whole(parameters), "writing weights", "tensors", len(parameters))
            try:
                if folder is not None:
                    write_model(folder, whole, self.source, self.tokenizer)
            finally:
                for _ in whole:  # where the disk is full the others still wait in it
                    pass
            return
        with self.strategy.assembled(self.model):
            if folder is None:
                return
            files = self.hook.sft_export_adapter(run=self, model=self.model)
            write_json(folder / "adapter_config.json", files.config)
            save_tensors(folder / "adapter_model.safetensors", files.tensors, {"format": "pt", **about_base(self)})
            self.tokenizer.save(folder)


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
