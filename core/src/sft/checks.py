"""What is refused before a run begins: settings, plugins, output folders and checkpoints that do not go together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runtime
from sft.data.batches import Schedule
from sft.data.tokenizer import FILES as TOKENIZER_FILES
from sft.errors import UsageError
from sft.files import read_report
from sft.inference.adapter import trained_over
from sft.settings.arguments import Settings
from sft.training.best import check as check_best
from sft.training.checkpoint import asks_to_resume, checkpoints, find_checkpoint, is_checkpoint

if TYPE_CHECKING:
    from sft.context import Run

RESULT_KEYS = ("adapter_config.json", "config.json")
"""The files with which every reader of an adapter or a model begins."""
PUBLISHED = (
    *RESULT_KEYS,
    *("adapter_model.safetensors", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", *TOKENIZER_FILES),
)
"""The files of a result."""
RESULT_FILES = ("run.json", *PUBLISHED, "metrics.jsonl", "generations-*.jsonl")
"""What a run writes into its folder beside checkpoints."""


IDLE_WITHOUT_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"),
    *("save_strategy", "evaluation_strategy", "load_best_model_at_end", "recompute", "lazy"),
)


def check_settings(settings: Settings) -> list[tuple[str, str]]:
    """Refuse settings that contradict each other; given ones that do nothing beside the others: ("name value", why)."""
    training = settings.training
    if training.max_steps == 0:
        raise UsageError("max_steps is 0, so nothing would be trained; give -1 to let num_train_epochs decide.")
    if training.bf16 and training.fp16:
        raise UsageError("bf16 and fp16 are both set; leave one of them out.")
    if settings.data.lazy and training.do_train and training.max_steps < 1:
        raise UsageError("lazy streams the data, whose length is then unknown; give max_steps.")
    if not training.do_train and training.do_eval is False:
        raise UsageError("do_train and do_eval are both false, so there is nothing to do; leave one of them out.")
    check_best(settings)
    flat = settings.flat()
    return [(f"{name} {flat[name]}", why) for name, why in _idle(settings) if name in settings.given]


def _idle(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings of the core that have no effect beside the others, and why."""
    training, generation = settings.training, settings.generation
    if training.save_strategy != "steps":
        yield "save_steps", f"save_strategy is {training.save_strategy}"
    if training.save_strategy == "no":
        yield "save_total_limit", "save_strategy is no"
    if training.evaluation_strategy != "steps":
        yield "eval_steps", f"evaluation_strategy is {training.evaluation_strategy}"
    if not training.load_best_model_at_end:
        for name in ("metric_for_best_model", "greater_is_better"):
            yield name, "load_best_model_at_end is false"
    if not (training.bf16 or training.fp16):
        for name in ("fp16_opt_level", "require_precision"):
            yield name, "neither bf16 nor fp16 is set"
    if not training.fp16:
        yield "scale_loss", "fp16 is not set"
    if not training.do_train:
        for name in IDLE_WITHOUT_TRAINING:
            yield name, "do_train is false"
    if training.warmup_steps:
        yield "warmup_ratio", "warmup_steps is given"
    if training.lr_scheduler_type == "constant":
        for name in ("warmup_steps", "warmup_ratio"):
            yield name, "the constant schedule has no warm-up"
    if training.lr_scheduler_type != "cosine":
        yield "num_cycles", "lr_scheduler_type is not cosine"
    if training.lr_scheduler_type != "polynomial":
        for name in ("power", "lr_end"):
            yield name, "lr_scheduler_type is not polynomial"
    if training.max_steps > 0:
        yield "num_train_epochs", "max_steps is given"
    if generation.top_k == 1:
        for name in ("top_p", "temperature"):
            yield name, "top_k is 1: the likeliest token is taken"
    if not generation.num_samples and not settings.data.eval_with_do_generation:
        for name in ("max_new_tokens", "top_k", "top_p", "temperature"):
            yield name, "no answers are generated (num_samples, eval_with_do_generation)"


def check_plugins(run: Run) -> None:
    """Refuse plugins that have nothing to train together."""
    quantizer = run.plugins.provider("sft_quantizer")
    if quantizer is not None and not run.exports_adapter:
        raise UsageError(
            f"Plugin {quantizer} quantizes the base model, which then cannot be trained as a whole; add an adapter "
            "plugin, or leave it out."
        )


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
    if asks_to_resume(training.resume_from_checkpoint) and training.do_train:
        source = find_checkpoint(training.resume_from_checkpoint, run.output_dir)
        status = read_report(run.output_dir).get("status")
        if source is None and status != "finished":  # it was stopped before its first checkpoint
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
    """Whether a run has written into ``folder``: run.json, the first file that it writes, or a checkpoint says so."""
    return (folder / "run.json").exists() or any(is_checkpoint(path) for path in checkpoints(folder))


def check_resumable(run: Run, schedule: Schedule, source: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint from which this run cannot go on exactly; says which settings have changed."""
    data, seed = state["data"], state["seed"]
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
    check_same_base(run, source)
    free = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm"}
    now = run.settings.flat()
    for name in sorted(set(now) | set(state["settings"])):
        if name not in free and now.get(name) != state["settings"].get(name):
            run.say(f"note: {name} was {state['settings'].get(name)!r} in {source.name} and is now {now.get(name)!r}")
    differences = runtime.differences(state.get("arithmetic", run.arithmetic), run.arithmetic)
    if differences:
        run.say(
            f"note: {source.name} was computed with another arithmetic, {differences}; what follows may differ in its "
            "last digits from what that run would have computed"
        )


def check_same_base(run: Run, source: Path) -> None:
    """Refuse a checkpoint whose adapter was trained over other weights than this run's base.

    Where the whole model trains, its weights are all in the checkpoint, and the base that it began with has no part in
    what follows.
    """
    from sft.models.fingerprint import has_fingerprint

    before = trained_over(source) if run.exports_adapter else None
    if before is not None and not has_fingerprint(run.source, before):
        raise UsageError(
            f"{source} holds an adapter that was trained over other weights than those of {run.source.folder}; put the "
            "base back as it was, or start a new run."
        )


def check_same_plugins(run: Run, source: Path, state: dict[str, Any]) -> None:
    """What was trained stays what it is, trained on or measured: the same shaping plugins with the same options. Others
    may come and go."""
    before, now = state["shaping"], run.shaping()
    go_on = "resume" if run.settings.training.do_train else "measure it"
    otherwise = ", or start a new run" if run.settings.training.do_train else ""
    if set(before) != set(now):
        raise UsageError(
            f"{source} was trained with plugins {', '.join(sorted(before)) or 'none'}, and this run has "
            f"{', '.join(sorted(now)) or 'none'}; {go_on} with the same plugins{otherwise}."
        )
    for name, options in now.items():
        for key, value in options.items():
            if before[name].get(key) != value:
                raise UsageError(
                    f"{source} was trained with {key} {before[name].get(key)!r} of plugin {name}, and this run has "
                    f"{value!r}; {go_on} with the same value{otherwise}."
                )
