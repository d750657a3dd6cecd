"""A finished model or adapter measured on data: the numbers that a run in the same precision finds at its end.

Without bf16 or fp16 that is float32, also for what was trained in another precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft import runtime
from sft.context import CoreRun
from sft.data.batches import PaddedCollator
from sft.data.reading import read_data
from sft.data.sets import OpenSets, open_sets
from sft.errors import UsageError
from sft.files import make_folder, read_report
from sft.foreign_text import shown
from sft.inference.open import load_adapted, settings_for, tokenizer_of, use
from sft.models.loading import open_model
from sft.options import options_of
from sft.settings.arguments import DataArguments, GenerationArguments, check_draw

LENGTHS = ("src_length", "max_length")
"""Settings of the data that decide what is measured."""
CHOICES = ("truncation", "enable_thinking", "train_on", "train_on_thoughts")
"""More of them, which most runs leave as they are."""
USES = (
    "sft evaluate",
    (
        *("sft_model_family", "sft_model_config", "sft_quantizer", "sft_kernels"),
        *("sft_attention_backend", "sft_record_format", "sft_data_source"),
    ),
)


def evaluate_finished(
    given: Mapping[str, Any],
    adapter: Path | None,
    say: Callable[[str], None],
    requested: Sequence[str] = (),
    generations: Path | None = None,
) -> dict[str, Any]:
    """The record of an evaluation (see ``sft_evaluated``) without ``step`` and ``epoch``.

    ``given``: settings by name. The data is the dev data of ``dataset_name_or_path``, or the file that it names.
    ``generations`` is where the answers of ``eval_with_do_generation`` are written, if anywhere.
    """
    started = time.monotonic()
    model = Path(str(given.get("model_name_or_path"))).expanduser()
    lengths = {} if all(name in given for name in (*LENGTHS, *CHOICES)) else _as_trained(adapter or model)
    settings, plugins = settings_for(adapter, requested, {**lengths, **given}, USES)
    check_draw(settings.generation)
    run = CoreRun(settings, plugins, say)
    taken = [f"{name} {value}" for name, value in lengths.items() if name not in given]
    if taken:
        say(f"{' and '.join(taken)}, as in the run that wrote {adapter or model}")
    sets = _dev_sets(run)
    if not settings.data.eval_with_do_generation:
        idle = [name for name in (*options_of(GenerationArguments), "seed") if name in given]
        idle += ["generations"] if generations is not None else []
        if idle:
            names = ", ".join(idle)
            raise UsageError(f"{names}: no answers are asked for; set eval_with_do_generation, or leave it out.")
    if generations is not None:
        make_folder(generations.parent)
    with run.progress, runtime.restored(settings.training.device):
        return {**_measure(run, sets, adapter, generations), "eval_seconds": round(time.monotonic() - started, 3)}


def _measure(run: CoreRun, sets: OpenSets, adapter: Path | None, generations: Path | None) -> dict[str, Any]:
    runtime.require_paddle()
    settings, plugins = run.settings, run.plugins
    source = open_model(settings.model.place, plugins, settings.model.allow_pickle, run)
    run.resumes, run.step = False, 0
    run.tokenizer = tokenizer_of(source, settings, adapter)
    _, run.dev_data, run.samples, run.questions, _ = read_data(
        settings, plugins, run.tokenizer, run.progress, sets, source.folder, source.architecture
    )
    run.say(runtime.prepare())

    from sft.models.setup import attention_backend, check_questions
    from sft.training.evaluation import dev_loss, score
    from sft.training.objective import RunObjective
    from sft.training.strategy import SingleProcess

    check_questions(run)
    run.precision = use(settings, run.say)
    run.collator = PaddedCollator(run.tokenizer.pad_id)
    run.strategy = SingleProcess()
    backend = attention_backend(run)
    run.model = load_adapted(source, settings, plugins, adapter, run.precision, run.progress)
    run.model.attention = backend or run.model.attention
    run.objective = RunObjective()
    record = dev_loss(run)
    if run.questions:
        record.update(score(run, generations))
    return record


def _as_trained(result: Path) -> dict[str, Any]:
    """The settings :data:`LENGTHS` of the run that wrote ``result``, or a checkpoint of it, and those of
    :data:`CHOICES` that are not the defaults; those that were not set, or no run tells, are left out."""
    usual = DataArguments()
    for folder in (result, result.parent) if (result / "trainer").is_dir() else (result,):
        try:
            settings = read_report(folder)["settings"]
            found = {name: int(settings[name]) for name in LENGTHS if settings.get(name) is not None}
            chosen = {name: settings[name] for name in CHOICES if settings.get(name) is not None}
            return {**found, **{name: value for name, value in chosen.items() if value != getattr(usual, name)}}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return {}


def _dev_sets(run: CoreRun) -> OpenSets:
    data = run.settings.data
    weighted = next((one for one in data.sets if one.weight is not None), None)
    if weighted is not None:
        raise UsageError(f"The weight of {shown(weighted.path)} does nothing here, all data is measured; leave it out.")
    sets = open_sets(data, run.plugins, run.progress, run.files_of, trains=False, files_are_dev=True)
    if not sets.dev:
        named = ", ".join(shown(one.path) for one in data.sets)
        raise UsageError(f"{named} has no dev data; give a folder that has some (dev.json), or one file.")
    return sets
