"""The parts that a run is put together from, in the order in which ``fine_tune.execute`` uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runtime
from sft.checks import RESULT_FILES, holds_run
from sft.data.batches import Data, PaddedCollator, Schedule
from sft.data.encoding import NO_TARGET, Encoded, Question, encode
from sft.data.formats import Conversation, Formats
from sft.data.sources import read, size_of, unread
from sft.data.stream import WINDOW, Stream
from sft.ending import without_best, write_report
from sft.errors import UsageError
from sft.files import make_folder, remove_folder, remove_leftovers
from sft.training.checkpoint import checkpoints, read_state, step_of

if TYPE_CHECKING:
    from sft.context import Run, Summary
    from sft.models.architecture import Architecture
    from sft.models.source import ModelFolder
    from sft.progress import Task
    from sft.training.journal import Journal
    from sft.training.optimizer import Optimizer


def read_data(run: Run, train_files: list[Path], dev_files: list[Path], folder: Path, known: Architecture) -> None:
    """Read, check and encode every record; says what became of them.

    ``known``: what the model in ``folder`` is, by its ``config.json``. Unless plugins may change it, its sizes are held
    against the tokenizer and each record at once, and not only by :func:`check_model`.
    """
    data = run.settings.data
    is_final = run.plugins.provider("sft_model_config") is None
    if is_final:
        check_vocabulary(run, folder, known.vocabulary)
    tokens_of = partial(
        encode,
        tokenizer=run.tokenizer,
        src_length=data.src_length,
        max_length=data.max_length,
        room=(folder, known.positions) if is_final else None,
    )
    run.say(f"chat template: {run.tokenizer.template_name}")

    def conversations(
        files: list[Path], formats: Formats | None = None, task: Task | None = None
    ) -> Iterator[Conversation]:
        formats = formats or Formats(run.plugins)
        for record in read(files):
            if task is not None:
                task.advance(done=record.done)
            yield formats.turns(record)

    def questions(files: list[Path], number: int | None) -> list[Question]:
        return [Question.of(turns, run.tokenizer, data.src_length) for turns in islice(conversations(files), number)]

    def encoded(files: list[Path], split: str) -> Encoded:
        formats = Formats(run.plugins)
        with run.progress.task(f"reading {split} data", "records", size_of(files), of_units=False) as task:
            found = tokens_of(conversations(files, formats, task))
        if not len(found):
            raise UsageError(NO_TARGET.format(split))
        run.say(f"{split} data: {found.counts.records:,} records of {formats.name}, {found.counts}")
        return found

    def streamed(files: list[Path], split: str) -> Stream:
        run.say(f"{split} data: streamed from {len(files)} file{'s' * (len(files) > 1)}, {WINDOW:,} records at a time")
        return Stream(files, partial(conversations, files), tokens_of, progress=run.progress)

    training = run.settings.training
    evaluates = training.do_eval is not False or training.evaluation_strategy != "no" or not training.do_train
    uses_dev = bool(dev_files) and evaluates
    if train_files:
        run.train_data = (streamed if data.lazy else encoded)(train_files, "train")
    if uses_dev:
        run.dev_data = encoded(dev_files, "dev")
    needs_dev = training.evaluation_strategy != "no" or training.do_eval
    if not training.do_train and run.dev_data is None:
        raise UsageError(
            f"do_train is false, and {data.dataset_name_or_path} has no dev data to measure; add dev.json, or measure "
            "a file with sft evaluate."
        )
    if needs_dev and run.dev_data is None:
        raise UsageError(
            f"Evaluation is asked for, and {data.dataset_name_or_path} has no dev data in use; add dev.json, "
            "or set evaluation_strategy to no and leave do_eval out."
        )
    if data.eval_with_do_generation and run.dev_data is None:
        raise UsageError(
            f"eval_with_do_generation answers dev data, and {data.dataset_name_or_path} has none in use; add dev.json, "
            "or leave do_eval and eval_with_do_generation out."
        )
    run.samples = questions(dev_files if uses_dev else train_files, run.settings.generation.num_samples)
    if data.eval_with_do_generation:
        run.questions = questions(dev_files, None)


def note_unread(run: Run, dataset: Path, files: list[Path]) -> None:
    """Say which files of a data folder look like data to measure on and are not read."""
    found = unread(dataset, files)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        run.say(
            f"note: {', '.join(found[:3])}{more} in {dataset} {'are' if len(found) > 1 else 'is'} not read; dev data "
            "is what is called dev or validation, and sft evaluate measures any file that it is given"
        )


def load_model(run: Run, place: ModelFolder) -> None:
    """Config, weights, attention and adapters, each with the plugins that have a say in it."""
    from sft.models import loading
    from sft.models.fingerprint import fingerprint
    from sft.models.layers import held_by, sizes, trainable
    from sft.training import precision
    from sft.training.strategy import SingleProcess

    if run.settings.training.device is not None:
        runtime.use_device(run.settings.training.device)
    run.arithmetic = runtime.arithmetic()
    run.precision = precision.choose(run.settings.training, run.say)
    run.collator = run.hook.sft_collator(run=run) or PaddedCollator(run.tokenizer.pad_id)
    run.strategy = run.hook.sft_parallel_strategy(run=run) or SingleProcess(run)
    loading.open_model(place, run.plugins, run)
    if run.exports_adapter:
        run.base_fingerprint = fingerprint(run.source)
    architecture = run.source.architecture
    check_model(run, place.path, *(data for data in (run.train_data, run.dev_data) if data is not None))
    quantizer = run.hook.sft_quantizer(run=run)
    backend = run.hook.sft_attention_backend(run=run, config=architecture)
    if backend is not None:
        _check_packing(run, backend)
    run.model = loading.load_model(run.source, quantizer, run.precision.weights, run.strategy, run.progress)
    run.model.attention = backend or run.model.attention
    if run.settings.training.recompute:
        run.model.model.recompute = True
    if run.exports_adapter:  # what is exported is the adapter, so the base must stay what it is
        for parameter in run.model.parameters():
            parameter.stop_gradient = True
    names = {name for name, _ in run.model.named_parameters()}
    run.hook.sft_adapt_model(run=run, model=run.model)
    if not run.exports_adapter and names != {name for name, _ in run.model.named_parameters()}:
        raise UsageError(
            f"Plugins {', '.join(run.plugins.names)} change the model's layers and none of them exports an adapter, "
            "so the result could not be saved; add one that does."
        )
    if not trainable(run.model):
        raise UsageError("Nothing trains: the active plugins left no trainable parameter.")
    run.sizes = count, total = sizes(dict(run.strategy.parameters(run.model)), run.model)
    run.strategy.connect(run.model)
    held = held_by(run.plugins.provider("sft_quantizer"), run.model)
    run.say(f"model: {total:,} parameters, {count:,} train ({100 * count / total:.2f} %){held}")


def check_model(run: Run, folder: Path, *data: Data) -> None:
    """Refuse a model that cannot read the tokenizer's tokens, a record of ``data``, or a prompt with its answer."""
    from sft.models.generation import check_room

    architecture = run.source.architecture
    check_vocabulary(run, folder, architecture.vocabulary)
    for records in data:
        records.check_fits(folder, architecture.positions)
    for question in [*run.samples, *run.questions]:
        check_room(question.ids, run.settings.generation, architecture.positions)


def check_vocabulary(run: Run, folder: Path, size: int) -> None:
    """Refuse a model that has no embedding for some of the tokenizer's tokens."""
    if run.tokenizer.vocab_size > size:
        raise UsageError(
            f"{folder}: its tokenizer has {run.tokenizer.vocab_size} tokens, its model {size}; "
            "they do not belong together."
        )


def _check_packing(run: Run, backend: Any) -> None:
    """A collator that packs and an attention that lets packed documents see each other do not go together."""
    architecture, attention = run.source.architecture, run.plugins.provider("sft_attention_backend")
    if architecture.attention_cap is not None and not getattr(backend, "caps", False):
        raise UsageError(
            f"{run.source.folder} caps its attention scores, which attention backend {attention} does not compute; "
            "leave it out."
        )
    windows = [block.window for block in architecture.blocks if block.window is not None]
    if not getattr(backend, "packed", False) and windows and min(windows) < architecture.positions:
        raise UsageError(
            f"{run.source.folder} has layers that see a window of {min(windows)} tokens, which attention backend "
            f"{attention} does not compute; leave it out."
        )
    if getattr(run.collator, "packs", False) and not getattr(backend, "packed", False):
        collator = run.plugins.provider("sft_collator")
        raise UsageError(
            f"Plugin {collator} packs several records into a row, and attention backend {attention} would let them "
            "see each other; leave one of them out."
        )


def make_optimizer(run: Run) -> Optimizer:
    """AdamW over the trainable parameters, in the groups that plugins made of them."""
    from sft.models.layers import trainable
    from sft.training.optimizer import Optimizer, check_groups, default_groups

    parameters = trainable(run.model)
    groups = default_groups(parameters, run.settings.training.weight_decay)
    run.hook.sft_parameter_groups(run=run, groups=groups)
    check_groups(groups, parameters)
    return Optimizer(run.strategy.share(groups), run.settings.training)


def make_schedule(run: Run) -> Schedule:
    """Which rows belong to which step, and how many steps there are."""
    training = run.settings.training
    assert run.train_data is not None
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * run.strategy.data_world
    return Schedule(run.train_data, run.collator, training.seed, rows, training.num_train_epochs, training.max_steps)


def open_journal(run: Run, source: Path | None, record: dict[str, Any]) -> Journal:
    """The journal in the run directory; the main process has emptied that of older runs, and writes. ``run.json`` says
    ``record``, and that the run is under way."""
    from sft.training.journal import Journal

    if run.strategy.is_main:
        _open_output(run, source, record)
    run.strategy.wait()
    return Journal(run.output_dir / "metrics.jsonl" if run.strategy.is_main else None)


def _open_output(run: Run, source: Path | None, record: dict[str, Any]) -> None:
    """The run directory, with nothing of an older run in it unless that run goes on from ``source``.

    Whatever stops this, the folder is known as a run's: run.json comes before anything else and is never away.
    """
    make_folder(run.output_dir)
    remove_leftovers(run.output_dir)
    is_used = holds_run(run.output_dir)
    write_report(run, {"status": "running", **record})
    if source is not None and source.parent.resolve() == run.output_dir.resolve():
        for folder in checkpoints(run.output_dir):
            if step_of(folder) > step_of(source):  # of a future that this run does not have
                remove_folder(folder)
        return
    if not is_used:
        return
    for folder in checkpoints(run.output_dir):
        remove_folder(folder)
    for pattern in RESULT_FILES:
        for path in run.output_dir.glob(pattern) if pattern != "run.json" else ():
            path.unlink()


def best_so_far(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """The best evaluation before a checkpoint, where its own checkpoint is still there and says what best now means."""
    from sft.training import best

    found: dict[str, Any] = state["best"]
    if not run.settings.training.load_best_model_at_end or not found:
        return {}
    if best.metric(run.settings)[0] in found and (run.output_dir / f"checkpoint-{found['step']}").is_dir():
        return found
    run.say(f"note: the best model so far (step {found['step']}) is not comparable or not here; the search begins anew")
    return {}


def load_best(run: Run) -> int | None:
    """Go back to the checkpoint whose evaluation was best; its step, or None if there is no such checkpoint."""
    from sft.training import best, checkpoint

    if not run.best:
        run.say("note: no checkpoint was evaluated, so the run ends with its last weights")
        return None
    folder = run.output_dir / f"checkpoint-{run.best['step']}"
    run.strategy.wait()  # the main process may still be writing it
    try:
        checkpoint.load_model(run, folder, read_state(folder))
    except UsageError as error:
        raise without_best(run, folder, error) from error
    key, _ = best.metric(run.settings)
    run.evaluation = run.best
    run.say(f"best model: {folder.name}, {key} {run.best[key]:.4f}")
    return step_of(folder)


def before_or_after(run: Run, step: int, epoch: float, journal: Any) -> dict[str, Any]:
    """Dev loss and sample answers, before or after training."""
    from sft.training.evaluation import answer, evaluate
    from sft.training.progress import figures

    found: dict[str, Any] = {}
    if run.dev_data is not None:
        if step == 0 and run.settings.training.do_train:
            training = run.settings.training
            asked = training.do_eval or training.evaluation_strategy != "no"
            run.say(
                f"dev data is measured before and after training: {len(run.dev_data):,} records, "
                f"{int(run.dev_data.lengths.sum()):,} tokens{'' if asked else ' (do_eval false leaves that out)'}"
            )
        if run.evaluation.get("step") != step:
            journal.write(evaluate(run, step, epoch))
        found["eval_loss"] = run.evaluation["eval_loss"]
        run.say(f"dev data {'before' if step == 0 else 'after'} training: {figures(run.evaluation)}")
    if run.samples:
        found["samples"] = answer(run, run.samples)
    return found


def summarise(run: Run, journal: Any, steps: int, epochs: float, after: dict[str, Any], seconds: float) -> Summary:
    """The numbers that a run ends with."""
    from sft.context import Summary

    count, total = run.sizes
    # A run that resumes with a larger num_samples has not asked all of them before training.
    answers = zip_longest(run.before.get("samples", [])[: len(run.samples)], after.get("samples", []), fillvalue="")
    samples = [
        {"prompt": question.prompt, "before": before, "after": later, "reference": question.reference}
        for question, (before, later) in zip(run.samples, answers, strict=True)
    ]
    found = {"train": run.train_data, "dev": run.dev_data}
    data = {split: records.report() for split, records in found.items() if records is not None}
    return Summary(
        output_dir=run.output_dir,
        steps=steps,
        epochs=epochs,
        seconds=round(seconds, 1),
        train_loss_first=journal.first_loss,
        train_loss_last=journal.last_loss,
        eval_loss_before=run.before.get("eval_loss"),
        eval_loss_after=after.get("eval_loss"),
        trainable_parameters=count,
        total_parameters=total,
        tokens=journal.total.tokens,
        target_tokens=journal.total.target_tokens,
        padding_tokens=journal.total.padding_tokens,
        rows=journal.total.rows,
        skipped_steps=journal.skipped_steps,
        peak_memory_mib=runtime.peak_memory_mib(),
        data=data,
        samples=samples,
        speaks=run.strategy.is_main,
    )


def describe(run: Run) -> dict[str, Any]:
    """The part of ``run.json`` that is known before training: settings, plugins with versions, machine."""
    packages = {}
    for name in ("sft-core", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": run.settings.flat(),
        "plugins": {name: run.plugins.origin(name) for name in run.plugins.names},
        "packages": packages,
        "machine": runtime.machine(),
        "arithmetic": run.arithmetic,
    }
