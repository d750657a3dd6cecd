"""The parts that a run is put together from, in the order in which ``running.execute`` uses them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runtime
from sft.data.batches import PaddedCollator, Schedule
from sft.data.encoding import Encoded, encode, encode_prompt
from sft.data.formats import turns_of
from sft.data.sources import read
from sft.data.tokenizer import FILES as TOKENIZER_FILES
from sft.errors import UsageError
from sft.files import make_folder, remove_folder, remove_leftovers
from sft.seams import Turn
from sft.settings import Settings, TrainingArguments, check_draw
from sft.training.checkpoint import checkpoints, find_checkpoint, read_state, step_of

RESULT_FILES = (
    *("run.json", "metrics.jsonl", "generations-*.jsonl", "adapter_config.json", "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", *TOKENIZER_FILES),
)
"""What a run writes into its folder beside checkpoints; an overwriting run removes it first."""

if TYPE_CHECKING:
    from sft.running import Run, Summary
    from sft.training.optimizer import Optimizer


def check_settings(settings: Settings) -> None:
    """Refuse settings that would do nothing, and those that contradict each other."""
    training = settings.training
    if training.max_steps == 0:
        raise UsageError("max_steps is 0, so nothing would be trained; give -1 to let num_train_epochs decide.")
    defaults = TrainingArguments()
    if training.save_strategy != "steps" and training.save_steps != defaults.save_steps:
        raise UsageError(f"save_steps does nothing while save_strategy is {training.save_strategy}; set it to steps.")
    if training.save_strategy == "no" and training.save_total_limit is not None:
        raise UsageError("save_total_limit does nothing while save_strategy is no; set it to steps or epoch.")
    if training.evaluation_strategy != "steps" and training.eval_steps is not None:
        raise UsageError(
            f"eval_steps does nothing while evaluation_strategy is {training.evaluation_strategy}; set it to steps."
        )
    check_draw(settings.generation)


def check_output(run: Run) -> None:
    """Refuse an output folder in which this run would destroy something."""
    training = run.settings.training
    existing = next(path for path in (run.output_dir, *run.output_dir.parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"output_dir {run.output_dir}: {existing} is a file; give a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {run.output_dir}: {existing} is not writable; give another folder.")
    if training.overwrite_output_dir and _resumes_here(run):
        raise UsageError("A run cannot be continued and overwritten; leave one of the two settings out.")
    for name in ("model_name_or_path", "dataset_name_or_path"):
        path = Path(str(run.settings.flat()[name])).expanduser()
        if path.exists() and path.resolve().is_relative_to(run.output_dir.resolve()):
            raise UsageError(
                f"output_dir {run.output_dir} contains {name} {path}, which would be overwritten; change one."
            )
    if not holds_run(run.output_dir):
        taken = [path.name for pattern in RESULT_FILES for path in run.output_dir.glob(pattern)]
        if taken:
            raise UsageError(
                f"output_dir {run.output_dir} holds {', '.join(taken[:3])}, which are no run's of sft and would be "
                "overwritten; choose another folder."
            )
    if not holds_run(run.output_dir) or training.overwrite_output_dir:
        find_checkpoint(training.resume_from_checkpoint, run.output_dir)
        return
    if training.resume_from_checkpoint is not None:
        source = find_checkpoint(training.resume_from_checkpoint, run.output_dir)
        if source is None and _status(run.output_dir) != "finished":  # it was stopped before its first checkpoint
            return
        if source is not None and source.parent.resolve() == run.output_dir.resolve():
            return
    raise UsageError(
        f"output_dir {run.output_dir} already holds a run; choose another folder, continue it with "
        "--resume_from_checkpoint auto, or replace it with --overwrite_output_dir."
    )


def _resumes_here(run: Run) -> bool:
    source = find_checkpoint(run.settings.training.resume_from_checkpoint, run.output_dir)
    return source is not None and source.parent.resolve() == run.output_dir.resolve()


def holds_run(folder: Path) -> bool:
    """Whether a run has written into ``folder``."""
    return (folder / "run.json").exists()


def _status(folder: Path) -> str:
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("status"))
    except (OSError, ValueError):
        return "unknown"


def read_data(run: Run, train_files: list[Path], dev_files: list[Path]) -> None:
    """Read, check and encode every record; says what became of them."""
    data = run.settings.data

    def encoded(files: list[Path], split: str, keep: int) -> Encoded:
        turns: Iterable[list[Turn]] = (turns_of(record, run.hook) for record in read(files))
        if split == "dev" and data.eval_with_do_generation:
            turns = _keeping(turns, run.dev_conversations, sys.maxsize)
        found = encode(_keeping(turns, run.dev_turns, keep), run.tokenizer, data.src_length, data.max_length)
        if not len(found):
            raise UsageError(
                f"No {split} record keeps a target within src_length {data.src_length} and max_length "
                f"{data.max_length}; raise them."
            )
        counts = found.counts
        run.say(
            f"{split} data: {counts.records:,} records, {counts.tokens:,} tokens, {counts.target_tokens:,} targets"
            + "".join(
                f", {value:,} {name.replace('_', ' ')}"
                for name, value in asdict(counts).items()
                if name in ("dropped", "turns_dropped", "prompts_truncated", "targets_truncated") and value
            )
        )
        return found

    samples = run.settings.generation.num_samples
    uses_dev = bool(dev_files) and run.settings.training.do_eval is not False
    if train_files:
        run.train_data = encoded(train_files, "train", 0 if uses_dev else samples)
    if uses_dev:
        run.dev_data = encoded(dev_files, "dev", samples)
    needs_dev = run.settings.training.evaluation_strategy != "no" or run.settings.training.do_eval
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


def _keeping(turns: Iterable[list[Turn]], kept: list[list[Turn]], number: int) -> Iterable[list[Turn]]:
    for conversation in turns:
        if len(kept) < number:
            kept.append(conversation)
        yield conversation


def load_model(run: Run, folder: Path) -> None:
    """Config, weights, attention and adapters, each with the plugins that have a say in it."""
    from sft.models import attention, loading
    from sft.models.generation import check_room
    from sft.models.layers import trainable
    from sft.training.evaluation import questions
    from sft.training.strategy import SingleProcess

    run.collator = run.hook.sft_collator(run=run) or PaddedCollator(run.tokenizer.pad_id)
    run.strategy = run.hook.sft_parallel_strategy(run=run) or SingleProcess(run)
    run.source = loading.open_model(folder)
    run.hook.sft_model_config(run=run, config=run.source.config)
    longest = int(max(data.lengths.max() for data in (run.train_data, run.dev_data) if data is not None))
    check_model(run, folder, longest)
    for turns in run.dev_turns:
        ids = encode_prompt(prompt_of(turns), run.tokenizer)
        check_room(ids, run.settings.generation, run.source.config.max_position_embeddings)
    run.questions = questions(run, run.dev_conversations)
    quantizer = run.hook.sft_quantizer(run=run)
    if quantizer is not None and not run.exports_adapter:
        raise UsageError(
            f"Plugin {run.plugins.provider('sft_quantizer')} quantizes the base model, which then cannot be trained as "
            "a whole; add an adapter plugin, or leave it out."
        )
    backend = run.hook.sft_attention_backend(run=run, config=run.source.config) or attention.DefaultAttention()
    _check_packing(run, backend)
    run.model = loading.load_model(run.source, quantizer)
    attention.install(run.model, backend)
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
    learned = trainable(run.model)
    if not learned:
        raise UsageError("Nothing trains: the active plugins left no trainable parameter.")
    count, total = sizes(run)
    run.say(f"model: {total:,} parameters, {count:,} train ({100 * count / total:.2f} %)")


def check_model(run: Run, folder: Path, longest: int) -> None:
    """Refuse a model that cannot read the tokenizer's tokens, or not ``longest`` of them."""
    config = run.source.config
    if run.tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"{folder}: its tokenizer has {run.tokenizer.vocab_size} tokens, its model {config.vocab_size}; "
            "they do not belong together."
        )
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"The longest record has {longest} tokens and {folder} reads {config.max_position_embeddings} "
            "(max_position_embeddings); set max_length to at most that."
        )


def _check_packing(run: Run, backend: Any) -> None:
    """A collator that packs and an attention that lets packed documents see each other do not go together."""
    if getattr(backend, "packed", False):
        return
    if any(len(row) > 1 for row in run.collator.rows(run.train_data.lengths, None)):
        collator, attention = (run.plugins.provider(h) for h in ("sft_collator", "sft_attention_backend"))
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
    return Optimizer(groups, run.settings.training)


def make_schedule(run: Run) -> Schedule:
    """Which rows belong to which step, and how many steps there are."""
    training = run.settings.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * run.strategy.data_world
    return Schedule(run.train_data, run.collator, training.seed, rows, training.num_train_epochs, training.max_steps)


def check_resumable(run: Run, schedule: Schedule, source: Path) -> dict[str, Any]:
    """The checkpoint's state, if this run can go on from it exactly; says which settings have changed."""
    state = read_state(source)
    data, seed = state["data"], state["random"]["seed"]
    if state["step"] > schedule.total_steps:
        raise UsageError(
            f"{source} is after step {state['step']} and this run ends at step {schedule.total_steps}; raise max_steps "
            "or num_train_epochs, or resume from an earlier checkpoint."
        )
    if data["fingerprint"] != schedule.data.fingerprint():
        raise UsageError(
            f"{source} was trained on other tokens, so its place in the data means nothing here; resume with the same "
            "data, model and lengths, or start a new run from its weights."
        )
    if data["rows_per_step"] != schedule.rows_per_step or seed != schedule.seed:
        raise UsageError(
            f"{source} was trained with seed {seed} and {data['rows_per_step']} rows a step, this run has seed "
            f"{schedule.seed} and {schedule.rows_per_step}; resume with the same seed and batch sizes."
        )
    free = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm"}
    now = run.settings.flat()
    for name in sorted(set(now) | set(state["settings"])):
        if name not in free and now.get(name) != state["settings"].get(name):
            run.say(f"note: {name} was {state['settings'].get(name)!r} in {source.name} and is now {now.get(name)!r}")
    return state


def open_output(run: Run, source: Path | None) -> None:
    """The run directory, with nothing of an older run in it unless that run goes on from ``source``."""
    make_folder(run.output_dir)
    remove_leftovers(run.output_dir)
    if source is not None and source.parent.resolve() == run.output_dir.resolve():
        for folder in checkpoints(run.output_dir):
            if step_of(folder) > step_of(source):  # of a future that this run does not have
                remove_folder(folder)
        return
    if not holds_run(run.output_dir):
        return
    for folder in checkpoints(run.output_dir):
        remove_folder(folder)
    for pattern in RESULT_FILES:
        for path in run.output_dir.glob(pattern):
            path.unlink()


def measure(run: Run, step: int, epoch: float, journal: Any) -> dict[str, Any]:
    """Dev loss and sample answers, before or after training."""
    from sft.models.generation import answer
    from sft.training.evaluation import evaluate
    from sft.training.progress import figures

    found: dict[str, Any] = {}
    if run.dev_data is not None:
        if run.evaluation.get("step") != step:
            journal.write(evaluate(run, step, epoch))
        found["eval_loss"] = run.evaluation["eval_loss"]
        run.say(f"dev data {'before' if step == 0 else 'after'} training: {figures(run.evaluation)}")
    prompts = [prompt_of(turns) for turns in run.dev_turns]
    if prompts:
        seed = run.settings.training.seed
        found["samples"] = [answer(run.model, run.tokenizer, p, run.settings.generation, seed) for p in prompts]
    return found


def prompt_of(turns: list[Turn]) -> list[Turn]:
    """The conversation up to its last answer."""
    last = max(index for index, turn in enumerate(turns) if turn.trains)
    return turns[:last]


def summarise(run: Run, journal: Any, steps: int, epochs: float, after: dict[str, Any], seconds: float) -> Summary:
    """The numbers that a run ends with."""
    from sft.running import Summary

    count, total = sizes(run)
    samples = []
    for index, turns in enumerate(run.dev_turns):
        prompt = prompt_of(turns)
        samples.append(
            {
                "prompt": prompt[-1].content,
                "before": run.before.get("samples", [])[index],
                "after": after["samples"][index],
                "reference": turns[len(prompt)].content,
            }
        )
    data = {"train": run.train_data.report()}
    if run.dev_data is not None:
        data["dev"] = run.dev_data.report()
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
        peak_memory_mib=runtime.peak_memory_mib(),
        data=data,
        samples=samples,
    )


def sizes(run: Run) -> tuple[int, int]:
    """Trainable and all parameters, as numbers of values."""
    sizes = {name: (int(p.size), not p.stop_gradient) for name, p in run.model.named_parameters()}
    return sum(size for size, trains in sizes.values() if trains), sum(size for size, _ in sizes.values())


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
    }
