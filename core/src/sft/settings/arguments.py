"""The settings of a run: four argument groups with PaddleNLP's names, and each active plugin's options."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.dataset_names import NamedSet, named_sets
from sft.errors import UsageError
from sft.foreign_text import quoted, shown, without_secrets
from sft.hub_names import is_hub_name, is_revision, split
from sft.options import Option, option, options_of
from sft.small_files import read_text
from sft.voice import LEVELS

SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused")
"""PaddleNLP's and transformers' names of the core's optimizer."""


@dataclasses.dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str | None = option(
        None,
        "model directory (Hugging Face or Paddle layout), a weight file in one, or hub name; required",
        is_path=True,
    )
    model_revision: str | None = option(
        None, "branch, tag or commit of a model of the hub, as in owner/name@revision; unset: main"
    )
    allow_pickle: bool = option(
        False, "read weights that are pickled (.pdparams, .bin) too: the tensors in them, and nothing is run"
    )
    tokenizer_name_or_path: str | None = option(
        None, "tokenizer directory or hub name (owner/name@revision too); unset: the model's own", is_path=True
    )
    new_tokens: list[str] = option(
        [],
        "tokens that tokenizer and model get (<a>,<b>), each whole wherever it stands; their embeddings begin as the "
        "mean, and beside an adapter embed_tokens and lm_head train whole",
    )
    new_tokens_path: str | None = option(
        None, "text file with such tokens, one in a line; they come after those of new_tokens", is_path=True
    )
    new_special_tokens: list[str] = option(
        [],
        "such tokens that are special: they mark something, and are left out where answers are shown or scored; after "
        "those of new_tokens and its file",
    )
    trainable_token_indices: list[Any] = option(
        [],
        "tokens of which the rows of embedding and lm_head train beside an adapter, and no others: ids, tokens as "
        "tokenizer.json has them, or new: those of new_tokens and new_special_tokens, whose embeddings then do not "
        "train whole",
    )
    modules_to_save: list[str] = option(
        [],
        "layers that train whole beside an adapter and are saved with it: embed_tokens, lm_head, other names, or "
        "regular expressions over whole names",
    )

    def __post_init__(self) -> None:
        """A revision in the name is the setting, too: what names the base of an adapter has none."""
        for name in ("new_tokens", "new_special_tokens"):
            for token in getattr(self, name):
                if not token.strip() or token.encode("utf-8", "replace").decode() != token:
                    raise UsageError(f"{name}: expected texts, got {quoted(token)}.")
        name, revision = split(self.model_name_or_path or "")
        if revision is not None:
            if self.model_revision not in (None, revision):
                raise UsageError(
                    f"model_name_or_path says revision {revision}, and model_revision {self.model_revision}; leave one "
                    "of them out."
                )
            self.model_name_or_path, self.model_revision = name, revision
        if self.model_revision is not None and not is_revision(self.model_revision):
            raise UsageError(
                f"model_revision: expected a branch, a tag or a commit, got {shown(repr(self.model_revision))}."
            )

    def tokens_to_add(self) -> dict[str, bool]:
        """Those of ``new_tokens``, then those in the file ``new_tokens_path``, whose empty lines are none, and those of
        ``new_special_tokens``; each with whether it is special. Raises :class:`UsageError` where the file cannot be
        read, and where a token is to be both."""
        ordinary, special = [*self.new_tokens, *self._tokens_of_file()], self.new_special_tokens
        if both := sorted({*ordinary} & {*special}):
            raise UsageError(
                f"new_special_tokens: {quoted(both[0])} is among new_tokens too; name it in one of them alone."
            )
        return {**dict.fromkeys(ordinary, False), **dict.fromkeys(special, True)}

    def _tokens_of_file(self) -> list[str]:
        if self.new_tokens_path is None:
            return []
        text = read_text(Path(self.new_tokens_path).expanduser(), "new_tokens_path: ")
        found = [line for line in text.splitlines() if line.strip()]
        if not found:
            raise UsageError(
                f"new_tokens_path: {shown(self.new_tokens_path)} holds no token; write one in a line, or leave it out."
            )
        return found

    @property
    def place(self) -> str:
        """What to open: ``model_name_or_path`` with its revision. Raises :class:`UsageError` where it has none."""
        name = str(self.model_name_or_path)
        if self.model_revision is None:
            return name
        if not is_hub_name(name):
            raise UsageError(
                f"model_revision does nothing for {shown(name)}, which is no name on the hub; leave it out."
            )
        return f"{name}@{self.model_revision}"


@dataclasses.dataclass
class DataArguments:
    """What it learns from."""

    dataset_name_or_path: str | list[Any] | None = option(
        None,
        "DIR with train.json, .jsonl, .csv or .parquet, or train/ with such (dev likewise), or one file; or several "
        "with commas, and weights after colons (a.json:0.7,b:0.3), or a list (docs/data.md); required",
    )
    mix_until: str = option(
        "first_exhausted",
        "data sets with weights: a pass ends when the first has been used up, or all have been",
        choices=("first_exhausted", "all_exhausted"),
    )
    dev_split: float | None = option(
        None,
        "dev data that is taken out of the training data of each set that has no own: a share below 1, or a number of "
        "records",
        above=0,
        maximum=10**9,
    )
    src_length: int = option(
        1024,
        "longest prompt, tokens; from max_length on, a prompt that is too long leaves the answer up to half",
        minimum=1,
    )
    max_length: int = option(2048, "longest record (prompt and answer together), tokens", minimum=2)
    truncation: str | None = option(
        None,
        "what becomes of a record longer than max_length: its left or right end goes, it is dropped, or split into "
        "rows; unset: old turns, the prompt's beginning and the answer's end go (raw text is split)",
        choices=("left", "right", "drop", "split"),
    )
    chat_template: str | None = option(
        None,
        "file with a chat template (Jinja, or PaddleNLP's chat_template.json), or none; unset: the tokenizer's own",
        none_is_text=True,
        is_path=True,
    )
    enable_thinking: bool | None = option(
        None, "what the chat template is told of this name, in training and in prompts; unset: nothing"
    )
    train_on: str = option(
        "answers",
        "what is learned: all answers, the last_answer alone, or everything that the model reads",
        choices=("answers", "last_answer", "everything"),
    )
    train_on_thoughts: str = option(
        "all",
        "thoughts (<think> …) in the answers that are learned: all, those that are not_empty, or none",
        choices=("all", "not_empty", "none"),
    )
    lazy: bool = option(False, "stream the training data instead of reading it whole; needs max_steps")
    dataset_num_proc: int | None = option(
        None,
        "processes that encode the data; unset: one a physical core where the data is large, and one for a stream",
        minimum=1,
        maximum=1024,
        aliases=("preprocessing_num_workers",),
    )
    encoded_cache: str | None = option(
        None,
        "folder in which data that is read whole is kept encoded for later runs; unset: it is not kept",
        is_path=True,
    )
    on_bad_record: str = option(
        "stop",
        "what a record does that cannot be read: stop the run, or skip: it is counted, and listed in bad_records.jsonl",
        choices=("stop", "skip"),
    )
    on_bad_record_limit: float = option(
        0.05, "skip: the largest share of bad records that a run goes on with", minimum=0, maximum=1
    )
    eval_with_do_generation: bool = option(False, "at evaluation, answer the dev prompts and score them (BLEU, ROUGE)")

    def __post_init__(self) -> None:
        _ = self.sets  # what is wrong with them
        if self.dev_split is not None and self.dev_split >= 1 and not float(self.dev_split).is_integer():
            raise UsageError(
                f"dev_split: expected a share below 1 or a whole number of records, got {quoted(self.dev_split)}."
            )

    @property
    def sets(self) -> tuple[NamedSet, ...]:
        """The data sets that ``dataset_name_or_path`` names."""
        return named_sets(self.dataset_name_or_path)


@dataclasses.dataclass
class GenerationArguments:
    """How answers are drawn, where a run shows some."""

    num_samples: int = option(
        0,
        "dev (else train) prompts to answer before and after training, shown and kept in run.json, and at each "
        "evaluation, kept in samples-STEP.jsonl",
        minimum=0,
    )
    max_new_tokens: int = option(128, "longest generated answer, tokens", minimum=1)
    top_k: int = option(1, "draw from the k likeliest tokens; 1 is greedy, 0 is no limit", minimum=0)
    top_p: float = option(1.0, "draw from the likeliest tokens of this joint probability", above=0, maximum=1)
    temperature: float = option(1.0, "divides the logits before a draw", above=0)


@dataclasses.dataclass
class TrainingArguments:
    """How it is trained."""

    output_dir: str | None = option(None, "where everything of this run is written; required", is_path=True)
    overwrite_output_dir: bool = option(False, "replace the run that output_dir holds")
    do_train: bool = option(True, "train; if not, the run only evaluates")
    do_eval: bool | None = option(None, "measure the dev loss before and after training; unset: when there is dev data")
    per_device_train_batch_size: int = option(8, "rows in a micro-batch", minimum=1)
    gradient_accumulation_steps: int = option(1, "micro-batches in an optimizer step", minimum=1)
    per_device_eval_batch_size: int = option(8, "rows in an evaluation batch", minimum=1)
    num_train_epochs: float = option(3.0, "passes over the data, unless max_steps is set", above=0, maximum=10_000)
    max_steps: int = option(-1, "optimizer steps; -1: num_train_epochs decides", minimum=-1, maximum=10**9)
    learning_rate: float = option(5e-5, "peak learning rate", minimum=0)
    lr_scheduler_type: str = option(
        "linear",
        "shape of the decay after warm-up, or one that a plugin brings; constant has no warm-up either",
        choices=SCHEDULES,
        hook="sft_schedule",
    )
    num_cycles: float = option(0.5, "cosine: waves; a half one goes down to 0 and no further", above=0)
    power: float = option(1.0, "polynomial: its exponent", above=0)
    lr_end: float = option(1e-7, "polynomial: the learning rate that it ends with", minimum=0)
    warmup_steps: int = option(0, "steps of linear warm-up; above 0 it overrides warmup_ratio", minimum=0)
    warmup_ratio: float = option(0.0, "share of all steps spent on warm-up", minimum=0, maximum=1)
    optim: str = option(
        "adamw",
        "what steps the weights: adamw (adamw_torch and adamw_torch_fused mean it too), or what a plugin brings",
        choices=ADAMW,
        hook="sft_optimizer",
    )
    weight_decay: float = option(0.0, "the optimizer's decoupled decay; biases and norms get none", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment", minimum=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment", minimum=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0: no clipping", minimum=0)
    skip_nan_grad: bool = option(
        False, "leave out a step whose loss or gradient is NaN or infinite, and count it; if not, it ends the run"
    )
    max_skipped_in_a_row: int = option(10, "steps left out one after the other with which the run ends", minimum=1)
    bf16: bool = option(False, "compute in bfloat16 where the device can")
    fp16: bool = option(False, "compute in float16 where the device can, with a dynamic loss scale")
    fp16_opt_level: str = option(
        "O1",
        "typed O1: float32 weights; O2: 16-bit weights with float32 masters; unset: what does not train has 16 bits",
        choices=("O1", "O2"),
    )
    scale_loss: float = option(2.0**15, "the loss scale that fp16 begins with", above=0)
    require_precision: bool = option(False, "refuse to run where the device cannot do bf16 or fp16, if asked for")
    recompute: bool = option(False, "recompute activations in backward instead of keeping them: less memory, more time")
    device: str | None = option(None, "cpu, gpu or gpu:N; unset: paddle's choice")
    logging_steps: int = option(500, "steps between lines; the first and the last are always logged", minimum=1)
    evaluation_strategy: str = option("no", "when to evaluate on the way", choices=("no", "steps", "epoch"))
    eval_steps: int | None = option(None, "steps between evaluations; unset: logging_steps", minimum=1)
    save_strategy: str = option("no", "when to write checkpoints", choices=("no", "steps", "epoch"))
    save_steps: int = option(500, "steps between checkpoints", minimum=1)
    save_total_limit: int | None = option(None, "checkpoints to keep; unset: all", minimum=1)
    load_best_model_at_end: bool = option(False, "end with the checkpoint whose evaluation was best")
    metric_for_best_model: str | None = option(
        None,
        "what best means: loss, ppl, accuracy, objective (where another than loss is minimised), or a score of "
        "eval_with_do_generation; unset: loss",
    )
    greater_is_better: bool | None = option(
        None, "whether a greater metric is better; unset: not for loss, ppl and objective"
    )
    resume_from_checkpoint: bool | str | None = option(
        None,
        "a checkpoint folder, or auto (or true): the newest in output_dir (a fresh start if there is none)",
        is_path=True,
    )
    report_to: list[str] = option(
        [], "where the run is logged beside its own files: names of plugins for that, all, or none", hook="sft_logged"
    )
    run_name: str | None = option(None, "what its report and report_to call the run; unset: the name of output_dir")
    disable_tqdm: bool = option(False, "plain lines instead of a progress bar")
    quiet: bool = option(False, "say notes alone, and at the end one line: log_level warning")
    log_level: str = option(
        "info",
        "what is said of a run: info: all; warning: notes, and at the end one line; error: why it ends, if it fails",
        choices=LEVELS,
    )
    json_logs: bool | str = option(
        False,
        "say it as events, one JSON object a line, on standard output (docs/terminal.md); stderr: on standard error",
        choices=("stderr",),
    )
    deterministic: bool | str = option(
        False,
        "the same bits each time on a GPU too, which is slower; the first micro-batch is computed twice to see it; "
        "strict: and a checkpoint of another arithmetic is refused",
        choices=("strict",),
    )
    seed: int = option(42, "seed of shuffling, initialisation and dropout", minimum=0, maximum=2**31 - 1)

    def __post_init__(self) -> None:
        self.report_to = [word.strip().lower() for word in self.report_to if word.strip().lower() != "none"]

    @property
    def level(self) -> str:
        """What is said of a run (``log_level``, or ``quiet``)."""
        return "warning" if self.quiet else self.log_level

    def warmup_of(self, total: int) -> int:
        """Steps of warm-up in a run of ``total`` optimizer steps."""
        return self.warmup_steps or math.ceil(total * self.warmup_ratio)


def check_precision(training: TrainingArguments) -> None:
    """Refuse settings of two precisions at once."""
    if training.bf16 and training.fp16:
        raise UsageError("bf16 and fp16 are both set; leave one of them out.")


def check_draw(generation: GenerationArguments) -> None:
    """Refuse settings of a draw where there is none."""
    if generation.top_k == 1 and (generation.temperature != 1.0 or generation.top_p != 1.0):
        raise UsageError("temperature and top_p do nothing while top_k is 1 (greedy); add --top_k 0 to draw.")


GROUPS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "generation": GenerationArguments,
    "training": TrainingArguments,
}


@dataclasses.dataclass
class Settings:
    """The resolved settings of a run: the four groups, and the active plugins' options by plugin name.

    Attributes:
        options: Of each active plugin, by its name, the instance of its ``Options``.
        given: Names of the settings that were given; the others have their defaults.
    """

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    training: TrainingArguments
    plugin: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, as a settings file would hold it: one that two plugins have is ``PLUGIN.NAME``."""
        return {name: value for name, value, _ in self._all()}

    def changed(self) -> dict[str, Any]:
        """The settings of :meth:`flat` that are not what they are by default, each with its default."""
        return {name: default for name, value, default in self._all() if value != default}

    def written(self) -> dict[str, Any]:
        """:meth:`flat`, as it is written down: what looks like a secret is masked."""
        return dict(without_secrets(self.flat()))

    def _all(self) -> Iterator[tuple[str, Any, Any]]:
        """Each setting: its name, its value, its default."""
        yield "plugin", list(self.plugin), []
        for part in (self.model, self.data, self.generation, self.training):
            declared = options_of(type(part))
            yield from ((name, value, declared[name].default) for name, value in dataclasses.asdict(part).items())
        each = {owner: options_of(type(options)) for owner, options in self.options.items()}
        counts = Counter(name for own in each.values() for one in own.values() for name in (one.name, *one.aliases))
        for owner, options in self.options.items():
            for name, value in dataclasses.asdict(options).items():
                written = name if counts[name] == 1 else long_name(owner, name)
                yield written, value, each[owner][name].default


def long_name(plugin: str, name: str) -> str:
    """An option of a plugin by the name that no other plugin's has."""
    return f"{plugin.replace('-', '_')}.{name}"


def core_options() -> dict[str, Option]:
    """The core's settings by name."""
    return {name: setting for group in GROUPS.values() for name, setting in options_of(group).items()}
