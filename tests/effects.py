"""What each setting that PaddleNLP's document names does to a run, and the tests that see it.

test_each_setting.py runs each of them; `make docs` makes docs/reference/paddlenlp.md of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.testing import read_metrics, write_data

MODELS = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models"
SAVING = {"save_strategy": "steps", "save_steps": 1}
GENERATING = {"num_samples": 1, "max_new_tokens": 12}


@dataclass
class Outcome:
    """What a run left behind, and what the plugin Watch saw."""

    folder: Path
    said: list[str]
    summary: sft.Summary
    batches: list[tuple[int, int]] = field(default_factory=list)
    """Rows and width of each training batch."""
    groups: dict[str, float] = field(default_factory=dict)
    decay: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    backend: str = ""
    """Where the attention backend that the model computes with is defined."""
    measured: list[int] = field(default_factory=list)
    """Rows of each batch of the evaluation after training."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]

    @property
    def rates(self) -> list[float]:
        return [step["learning_rate"] for step in self.steps]

    @property
    def plugins(self) -> list[str]:
        return json.loads((self.folder / "run.json").read_text())["settings"]["plugin"]

    @property
    def evaluated(self) -> list[int]:
        return [line["step"] for line in self.lines if "eval_loss" in line]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[11:]) for path in self.folder.glob("checkpoint-*"))

    @property
    def adapter(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())

    def said_of(self, start: str) -> str:
        return next((line for line in self.said if line.startswith(start)), "")


def run(folder: Path, data: Path, **changes: Any) -> Outcome:
    seen: dict[str, Any] = {"batches": [], "groups": {}, "steps": [], "decay": 0.0, "measured": []}

    class Watch(sft.Plugin):
        name = "watch"
        api_version = 1
        order = 100

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
            seen["batches"].append(tuple(batch.input_ids.shape))

        @sft.hookimpl
        def sft_parameter_groups(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> None:
            seen["groups"] = {group.name: group.learning_rate for group in groups}
            seen["decay"] = max(group.weight_decay for group in groups)

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            seen["steps"].append(record)

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            seen["backend"] = type(run.model.attention).__module__

            def forward(layer: Any, inputs: Any) -> None:
                if not layer.training and inputs[0].shape[1] > 1:
                    seen["measured"].append(inputs[0].shape[0])

            run.model.model.layers[0].register_forward_pre_hook(forward)

    settings = {
        "model_name_or_path": str(MODELS / "llama-tied-gqa"),
        "dataset_name_or_path": str(data),
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    said: list[str] = []
    given = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    summary = sft.run(given, plugins=[Watch], say=said.append)
    return Outcome(Path(str(given["output_dir"])), said, summary, **seen)


Check = Callable[[Outcome, Outcome], Any]


@dataclass(frozen=True)
class Effect:
    """``text`` says what the setting does; with ``changes`` beside ``beside``, ``check(before, after)`` must hold."""

    text: str
    changes: dict[str, Any]
    check: Check
    beside: dict[str, Any] = field(default_factory=dict)


def last(outcome: Outcome) -> float:
    return outcome.losses[-1]


LORA = {"lora": True}
EFFECTS: dict[str, Effect] = {
    # Model
    "model_name_or_path": Effect(
        "the model that is trained",
        {"model_name_or_path": str(MODELS / "qwen2-untied")},
        lambda a, b: a.summary.total_parameters != b.summary.total_parameters,
    ),
    "lora": Effect("trains low-rank adapters", LORA, lambda a, b: b.adapter["peft_type"] == "LORA"),
    "lora_rank": Effect(
        "rank of the adapters", {"lora_rank": 4}, lambda a, b: (a.adapter["r"], b.adapter["r"]) == (8, 4), LORA
    ),
    "rslora": Effect(
        "the adapters' scaling is α/√r",
        {"rslora": True},
        lambda a, b: b.adapter["use_rslora"] is True and last(a) != last(b),
        LORA,
    ),
    "pissa": Effect("adapters start from singular vectors", {"pissa": True}, lambda a, b: b.adapter["r"] == 16, LORA),
    "lora_plus_scale": Effect(
        "B learns that many times faster than A",
        {"lora_plus_scale": 4.0},
        lambda a, b: max(b.groups.values()) == 4.0 > max(a.groups.values()) and last(a) != last(b),
        LORA,
    ),
    "vera": Effect(
        "trains vectors over one random pair", {"vera": True}, lambda a, b: b.adapter["peft_type"] == "VERA"
    ),
    "vera_rank": Effect(
        "rank of the random pair",
        {"vera_rank": 4},
        lambda a, b: (a.adapter["r"], b.adapter["r"]) == (8, 4),
        {"vera": True},
    ),
    "neftune": Effect(
        "adds noise to embeddings while training",
        {"neftune": True},
        lambda a, b: a.losses[0] != b.losses[0] and a.summary.eval_loss_before == b.summary.eval_loss_before,
    ),
    "neftune_noise_alpha": Effect(
        "how much noise", {"neftune_noise_alpha": 50.0}, lambda a, b: a.losses[0] != b.losses[0], {"neftune": True}
    ),
    "weight_quantize_algo": Effect(
        "holds the base model in 4 or 8 bits",
        {"weight_quantize_algo": "nf4"},
        lambda a, b: b.plugins.count("nf4") and a.summary.eval_loss_before != b.summary.eval_loss_before,
        LORA,
    ),
    "use_flash_attention": Effect(
        "computes attention in blocks",
        {"use_flash_attention": True},
        lambda a, b: a.backend == "sft.models.attention" and b.backend == "sft_attn_flashmask.backends",
    ),
    "flash_mask": Effect(
        "skips what is masked",
        {"use_flash_attention": True, "flash_mask": True},
        lambda a, b: b.backend == "sft_attn_flashmask.backends" and "flash-attention" not in b.plugins,
    ),
    # Data
    "dataset_name_or_path": Effect(
        "what is learned", {}, lambda a, b: a.summary.data["train"]["records"] != b.summary.data["train"]["records"]
    ),
    "zero_padding": Effect(
        "packs records into rows of max_length",
        {"zero_padding": True},
        lambda a, b: b.summary.tokens > a.summary.tokens,
    ),
    "greedy_zero_padding": Effect(
        "packs records best-fit-decreasing",
        {"greedy_zero_padding": True},
        lambda a, b: "greedy-zero-padding" in b.plugins and b.summary.tokens > a.summary.tokens,
    ),
    "src_length": Effect(
        "cuts prompts", {"src_length": 8}, lambda a, b: b.summary.data["train"]["prompts_truncated"] == 24
    ),
    "max_length": Effect("cuts records", {"max_length": 40}, lambda a, b: max(width for _, width in b.batches) < 40),
    "truncation": Effect(
        "drops long records",
        {"truncation": "drop"},
        lambda a, b: b.summary.data["train"]["records_too_long"] > 0,
        {"max_length": 40},
    ),
    "lazy": Effect("streams the data", {"lazy": True}, lambda a, b: "streamed" in b.said_of("train data")),
    "eval_with_do_generation": Effect(
        "scores answers to the dev prompts",
        {"eval_with_do_generation": True, "max_new_tokens": 4},
        lambda a, b: (
            any("eval_bleu4" in line for line in b.lines) and not any("eval_bleu4" in line for line in a.lines)
        ),
    ),
    "chat_template": Effect(
        "how conversations are written", {"chat_template": "none"}, lambda a, b: a.losses[0] != b.losses[0]
    ),
    # Generation
    "top_k": Effect(
        "draws answers from the k likeliest tokens",
        {"top_k": 50},
        lambda a, b: a.summary.samples[0]["before"] != b.summary.samples[0]["before"],
        GENERATING,
    ),
    "top_p": Effect(
        "draws answers from the likeliest tokens of that joint probability",
        {"top_p": 0.01},
        lambda a, b: a.summary.samples[0]["before"] != b.summary.samples[0]["before"],
        {**GENERATING, "top_k": 0},
    ),
    # Training
    "output_dir": Effect(
        "where all of it goes", {}, lambda a, b: a.folder != b.folder and (b.folder / "run.json").exists()
    ),
    "per_device_train_batch_size": Effect(
        "rows in a micro-batch", {"per_device_train_batch_size": 3}, lambda a, b: {rows for rows, _ in b.batches} == {3}
    ),
    "gradient_accumulation_steps": Effect(
        "micro-batches in a step",
        {"gradient_accumulation_steps": 2},
        lambda a, b: len(b.batches) == 2 * len(a.batches) == 8,
    ),
    "num_train_epochs": Effect(
        "passes over the data",
        {"num_train_epochs": 1},
        lambda a, b: (a.summary.steps, b.summary.steps) == (24, 12),
        {"max_steps": -1, "num_train_epochs": 2},
    ),
    "max_steps": Effect("the most optimizer steps", {"max_steps": 2}, lambda a, b: b.summary.steps == 2),
    "learning_rate": Effect(
        "the peak of the learning rate",
        {"learning_rate": 2e-3},
        lambda a, b: b.rates == pytest.approx([2 * rate for rate in a.rates]),
    ),
    "warmup_steps": Effect("steps up to the peak", {"warmup_steps": 2}, lambda a, b: b.rates[:3] == [0.0, 5e-4, 1e-3]),
    "warmup_ratio": Effect(
        "steps up to the peak, as a share of all", {"warmup_ratio": 0.5}, lambda a, b: b.rates[:3] == [0.0, 5e-4, 1e-3]
    ),
    "lr_scheduler_type": Effect(
        "the shape of the learning rate's decay",
        {"lr_scheduler_type": "constant"},
        lambda a, b: set(b.rates) == {1e-3} != set(a.rates),
    ),
    "weight_decay": Effect(
        "the decay of AdamW",
        {"weight_decay": 0.3},
        lambda a, b: (a.decay, b.decay) == (0.0, 0.3) and a.losses[:2] != b.losses[:2],
    ),
    "max_grad_norm": Effect(
        "clips gradients", {"max_grad_norm": 1e-6}, lambda a, b: a.losses[0] == b.losses[0] and last(a) != last(b)
    ),
    "logging_steps": Effect(
        "steps between lines",
        {"logging_steps": 3},
        lambda a, b: [line["step"] for line in b.lines if "loss" in line] == [1, 3, 4],
    ),
    "evaluation_strategy": Effect(
        "when dev data is measured on the way",
        {"evaluation_strategy": "steps"},
        lambda a, b: (a.evaluated, b.evaluated) == ([0, 4], [0, 1, 2, 3, 4]),
    ),
    "eval_steps": Effect(
        "steps between two evaluations",
        {"eval_steps": 2},
        lambda a, b: b.evaluated == [0, 2, 4],
        {"evaluation_strategy": "steps"},
    ),
    "do_eval": Effect(
        "measures dev data at all",
        {"do_eval": False},
        lambda a, b: b.summary.eval_loss_after is None and not b.evaluated,
    ),
    "do_train": Effect(
        "off: measures and trains nothing", {"do_train": False}, lambda a, b: b.evaluated == [0] and not b.steps
    ),
    "per_device_eval_batch_size": Effect(
        "rows in an evaluation batch",
        {"per_device_eval_batch_size": 4},
        lambda a, b: (a.measured, b.measured) == ([6], [4, 2]),
    ),
    "save_strategy": Effect("when checkpoints are written", SAVING, lambda a, b: b.checkpoints == [1, 2, 3, 4]),
    "save_steps": Effect("steps between two checkpoints", {"save_steps": 3}, lambda a, b: b.checkpoints == [3], SAVING),
    "save_total_limit": Effect(
        "how many checkpoints stay", {"save_total_limit": 2}, lambda a, b: b.checkpoints == [3, 4], SAVING
    ),
    "seed": Effect(
        "the seed of shuffling and drawing",
        {"seed": 7},
        lambda a, b: a.losses != b.losses and a.summary.eval_loss_before == b.summary.eval_loss_before,
    ),
}
# The effect of these does not show in one run beside another; the test that sees it is named instead.
_DIVIDES = "plugins/parallel_4d/tests/test_ranks_agree.py::test_each_setting_divides_what_it_says"
PARALLEL = {
    "tensor_parallel_degree": ("processes that share each layer", _DIVIDES),
    "pipeline_parallel_degree": ("stages of consecutive layers", _DIVIDES),
    "context_parallel_degree": ("processes that share the tokens of each row", _DIVIDES),
    "expert_parallel_degree": (
        "data ranks that share out experts",
        "plugins/parallel_4d/tests/test_experts.py::test_each_process_has_its_experts",
    ),
    "sharding": ("what data ranks keep in pieces: stage1, stage2, stage3, offload", _DIVIDES),
    "sharding_parallel_degree": ("data ranks that share pieces", _DIVIDES),
    "sequence_parallel": ("divides the residual stream along the sequence", _DIVIDES),
}
ELSEWHERE: dict[str, tuple[str, str]] = {
    **PARALLEL,
    "optim": (
        "what steps the weights",
        "plugins/optimizers/tests/test_runs.py::test_a_resumed_run_is_the_same_to_the_bit_and_learns",
    ),
    "mix_until": (
        "when a pass over data sets with weights ends",
        "core/tests/test_mixing.py::test_weights_that_make_a_pass_endless_are_refused",
    ),
    "dev_split": (
        "takes dev data out of training data",
        "core/tests/test_dev_split.py::test_a_run_trains_on_the_one_side_and_measures_the_other",
    ),
    "report_to": (
        "where the run is logged beside its own files; with no plugin installed for that, it is listed without effect",
        "plugins/track/tests/test_tracker.py::test_all_means_those_that_are_there",
    ),
    "run_name": (
        "what its report and report_to call the run",
        "plugins/track/tests/test_tracker.py::test_a_run_has_a_name",
    ),
    "load_best_model_at_end": (
        "ends with the best checkpoint",
        "core/tests/test_best.py::test_the_result_is_the_best_checkpoint",
    ),
    "metric_for_best_model": ("what best means", "core/tests/test_best.py::test_another_metric_decides"),
    "bf16": (
        "16-bit matrix products, where the device has them; said and float32 where not",
        "core/tests/test_precision.py::test_what_the_device_cannot_do_is_said_and_computed_in_float32",
    ),
    "fp16": (
        "16-bit matrix products, with a dynamic loss scale",
        "core/tests/test_precision.py::test_levels_on_a_gpu",
    ),
    "lora_path": (
        "an adapter to go on from",
        "plugins/peft_lora/tests/test_lora_folder.py::test_a_run_goes_on_from_an_adapter",
    ),
    "resume_from_checkpoint": (
        "goes on from a checkpoint",
        "core/tests/test_resuming.py::test_a_resumed_run_is_the_run_that_was_never_stopped",
    ),
    "overwrite_output_dir": (
        "replaces the run in output_dir",
        "core/tests/test_run_refused.py::test_overwriting_removes_the_old_run_and_nothing_else",
    ),
    "fp16_opt_level": ("O2: 16-bit weights, float32 masters", "core/tests/test_precision.py::test_levels_on_a_gpu"),
    "recompute": (
        "less memory, the same losses",
        "core/tests/test_recompute.py::test_less_memory",
    ),
    "disable_tqdm": ("no progress bar", "core/tests/test_progress.py::test_a_terminal_gets_a_bar"),
}


def make_data(folder: Path) -> Path:
    """24 train and 6 dev records in ``folder``."""
    kinds = ["coat", "shirt", "dress", "skirt"]
    records = [
        {"src": f"type#{kinds[n % 4]}" + "*warm" * (n % 3), "tgt": f"A {kinds[n % 4]}" + " you" * (n % 4)}
        for n in range(30)
    ]
    return write_data(folder, records[:24], records[24:])
