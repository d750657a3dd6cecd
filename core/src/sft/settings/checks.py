"""What is refused before a run begins: settings and plugins that do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sft.errors import UsageError
from sft.settings.arguments import ADAMW, Settings, check_precision
from sft.settings.best_metric import check_best

if TYPE_CHECKING:
    from sft.plugins.registry import Plugins

IDLE_WITHOUT_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "optim", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"),
    *("save_strategy", "evaluation_strategy", "load_best_model_at_end", "recompute", "lazy"),
)


def check_settings(settings: Settings, plugins: Plugins) -> list[tuple[str, str]]:
    """Refuse settings that contradict each other; given ones that do nothing beside the others, and that no plugin
    reads either: ("name value", why)."""
    training = settings.training
    if training.max_steps == 0:
        raise UsageError("max_steps is 0, so nothing would be trained; give -1 to let num_train_epochs decide.")
    check_precision(training)
    if settings.data.lazy and training.do_train and training.max_steps < 1:
        raise UsageError("lazy streams the data, whose length is then unknown; give max_steps.")
    if not training.do_train and training.do_eval is False:
        raise UsageError("do_train and do_eval are both false, so there is nothing to do; leave one of them out.")
    if settings.data.train_on == "everything" and settings.data.train_on_thoughts != "all":
        raise UsageError("train_on everything learns thoughts too; leave train_on_thoughts out.")
    check_best(settings)
    if training.quiet and "log_level" in settings.given and training.log_level != "warning":
        raise UsageError(f"quiet is log_level warning, and log_level is {training.log_level}; leave one of them out.")
    if settings.model.modules_to_save and plugins.provider("sft_export_adapter") is None:
        raise UsageError(
            "modules_to_save names layers beside an adapter, and this run trains all of them; leave it out."
        )
    if settings.model.trainable_token_indices and plugins.provider("sft_export_adapter") is None:
        raise UsageError(
            "trainable_token_indices names rows that train beside an adapter, and this run trains all of them; leave "
            "it out."
        )
    flat = settings.flat()
    read = {name for _, plugin in plugins for name in getattr(plugin, "reads", ())}
    idle = [(name, why) for name, why in _idle(settings) if name in settings.given and name not in read]
    return [(f"{name} {flat[name]}", why) for name, why in idle]


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
    if not any(one.weight is not None for one in settings.data.sets):
        yield "mix_until", "no data set has a weight"
    if settings.data.truncation is not None and not (generation.num_samples or settings.data.eval_with_do_generation):
        yield "src_length", f"truncation {settings.data.truncation} goes by max_length, and no prompt is answered"
    if settings.data.on_bad_record != "skip":
        yield "on_bad_record_limit", "on_bad_record is stop"
    if not (training.bf16 or training.fp16):
        for name in ("fp16_opt_level", "require_precision"):
            yield name, "neither bf16 nor fp16 is set"
    if not training.skip_nan_grad:
        yield "max_skipped_in_a_row", "skip_nan_grad is false"
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
    if training.optim not in ADAMW:
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            yield name, f"optim is {training.optim}"
    if training.max_steps > 0:
        yield "num_train_epochs", "max_steps is given"
    if generation.top_k == 1:
        for name in ("top_p", "temperature"):
            yield name, "top_k is 1: the likeliest token is taken"
    if not generation.num_samples and not settings.data.eval_with_do_generation:
        for name in ("max_new_tokens", "top_k", "top_p", "temperature"):
            yield name, "no answers are generated (num_samples, eval_with_do_generation)"


def check_plugins(plugins: Plugins) -> None:
    """Refuse plugins that cannot train together, whatever their options."""
    quantizer = plugins.provider("sft_quantizer")
    if quantizer is not None and plugins.provider("sft_export_adapter") is None:
        raise UsageError(
            f"Plugin {quantizer} quantizes the base model, which then cannot be trained as a whole; add an adapter "
            "plugin, or leave it out."
        )
    objective = plugins.provider("sft_objective")
    if objective is not None:
        check_alone(objective, [name for name in plugins.implementing("sft_token_loss") if name != objective])


def check_alone(objective: str, token_losses: Sequence[str]) -> None:
    """Refuse an objective beside losses of tokens, which are no part of it."""
    if token_losses:
        raise UsageError(
            f"Plugin {objective} minimises something else than the loss of tokens, which {token_losses[0]} changes; "
            "leave one of them out."
        )
