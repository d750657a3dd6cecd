"""PaddleNLP's settings that mean nothing here: each is named with the reason when a run begins, none is just accepted.

The table is asked for names that neither the core nor an active plugin declares. Most names are harmless at some
values alone, at which PaddleNLP does what sft does; at others the run would not be what the file asks for, and that is
an error. An active plugin that answers some of them has rows of its own (:attr:`sft.Plugin.paddlenlp`), which go first.
Names are those of ``run_finetune.py`` in paddlenlp 3.0.0b4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sft.errors import UsageError
from sft.plugins.discovery import of_absent_plugin


@dataclass(frozen=True)
class Foreign:
    """Why a setting has no effect.

    Attributes:
        reason: In a clause, as a run lists it.
        harmless: The values of which that is true; None: all of its ``kind``.
        kind: What PaddleNLP takes: "true or false", "a number", "text", or its words, separated by commas.
    """

    reason: str
    harmless: tuple[str, ...] | None = None
    kind: str = "text"

    def accepts(self, text: str) -> bool:
        """Whether PaddleNLP would take ``text``; an unset value always."""
        if text in ("", "none", "null") or self.kind == "text":
            return True
        if self.kind == "true or false":
            return text in ("true", "false", "yes", "no", "on", "off", "1", "0")
        if self.kind == "a number":
            return text.lstrip("+-").replace(".", "", 1).isdigit()
        return set(text.replace(",", " ").split()) <= set(self.kind.split(", "))


OFF = ("", "none", "null", "false", "no", "off", "0", "-1")
ALONE = (*OFF, "1")


def _each(names: str, reason: str, harmless: tuple[str, ...] | None = None, kind: str = "text") -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign(reason, harmless, kind))


FLAG, NUMBER = "true or false", "a number"
# Reasons that several names share.
SEVERAL = "one process exchanges no data with others"
ABSENT = "it belongs to a technique that is off"
WHOLE = "checkpoints are always whole safetensors, readable under any plan"
JOURNAL = "a run logs to its own metrics.jsonl and run.json"
HUB = "models come from a directory or the Hugging Face hub"
HERE = "data is read, and made into batches, in this process"
PADDED = "rows are padded to the longest of their batch: the same losses"
SPEED = "it changes the speed of PaddleNLP's code, not the result"
LAYERS = "recompute is of whole layers: the same result"

FOREIGN: dict[str, Foreign] = {
    # How a run is split over devices.
    **_each(
        "tensor_parallel_degree pipeline_parallel_degree sharding_parallel_degree sharding_degree "
        "sep_parallel_degree context_parallel_degree expert_parallel_degree "
        "expert_tensor_parallel_degree virtual_pp_degree",
        "one process has nothing to split; a degree above 1 needs a plugin that is not installed here",
        ALONE,
    ),
    **_each("sequence_parallel use_expert_parallel enable_auto_parallel", "it needs several processes", OFF),
    **_each(
        "sharding",
        SEVERAL,
        kind="stage1, stage2, stage3, offload",
    ),
    **_each(
        "sharding_parallel_config tensor_parallel_config pipeline_parallel_config "
        "sequence_parallel_config data_parallel_config hybrid_parallel_topo_order",
        SEVERAL,
    ),
    **_each(
        "sharding_parallel_mesh_dimension",
        SEVERAL,
        kind="dp",
    ),
    **_each(
        "sharding_comm_buffer_size_MB expert_max_capacity expert_min_capacity pp_recompute_interval "
        "ordered_save_group_size local_rank",
        SEVERAL,
        kind=NUMBER,
    ),
    **_each(
        "fuse_sequence_parallel_allreduce split_inputs_sequence_dim ddp_find_unused_parameters "
        "tensor_parallel_output distributed_dataloader force_reshard_pp "
        "save_sharding_stage1_model_include_freeze_params auto_parallel_resume_form_hybrid_parallel "
        "log_on_each_node save_on_each_node",
        SEVERAL,
        kind=FLAG,
    ),
    # Checkpoints and what is written.
    **_each(
        "unified_checkpoint use_async_save save_sharded_model load_sharded_model",
        WHOLE,
        kind=FLAG,
    ),
    **_each(
        "unified_checkpoint_config",
        WHOLE,
    ),
    **_each(
        "ckpt_quant_stage",
        WHOLE,
        kind="o0, o1, o2",
    ),
    **_each(
        "ignore_save_lr_and_optim ignore_load_lr_and_optim ignore_data_skip",
        "a checkpoint always holds, and a resumed run always takes, the optimizer and its place in the data",
        OFF,
    ),
    **_each("skip_data_intervals", "no step's data can be skipped", OFF),
    **_each(
        "save_generation_output",
        "generations of an evaluation are always saved",
        kind=FLAG,
    ),
    **_each(
        "logging_dir wandb_api_key wandb_http_proxy metrics_output_path output_signal_dir",
        JOURNAL,
    ),
    **_each(
        "skip_profile_timer skip_memory_metrics count_trained_tokens",
        JOURNAL,
        kind=FLAG,
    ),
    **_each("logging_strategy", "lines are logged every logging_steps", ("steps",)),
    **_each(
        "logging_first_step",
        "the first step is always logged",
        kind=FLAG,
    ),
    **_each("do_predict do_export prediction_loss_only", "a run trains and evaluates", OFF),
    **_each("benchmark autotuner_benchmark", "a run is not a benchmark", OFF),
    **_each("from_aistudio save_to_aistudio", HUB, OFF),
    **_each(
        "aistudio_repo_id aistudio_repo_license aistudio_token",
        HUB,
    ),
    **_each(
        "aistudio_repo_private pdc_download_ckpt",
        HUB,
        kind=FLAG,
    ),
    **_each(
        "pdc_download_timeout",
        HUB,
        kind=NUMBER,
    ),
    # Data.
    **_each(
        "eval_accumulation_steps",
        "evaluation adds up sums batch by batch and keeps no predictions",
        kind=NUMBER,
    ),
    **_each(
        "dataloader_num_workers dataset_batch_size past_index",
        HERE,
        kind=NUMBER,
    ),
    **_each(
        "remove_unused_columns lazy_data_processing",
        HERE,
        kind=FLAG,
    ),
    **_each(
        "label_names",
        HERE,
    ),
    **_each("dataloader_drop_last", "no record is dropped at the end of an epoch", OFF),
    **_each(
        "pad_to_multiple_of",
        PADDED,
        kind=NUMBER,
    ),
    **_each(
        "pad_to_max_length",
        PADDED,
        kind=FLAG,
    ),
    **_each(
        "pad_token_id",
        "padding is masked, so its id does not matter",
        kind=NUMBER,
    ),
    **_each("task_name dataset_kwargs", "dataset_name_or_path says all", OFF),
    **_each("autoregressive use_pose_convert", "only targets of conversations are trained", OFF),
    **_each("dataset_text_field", "records are conversations", ("", "none", "null", "text")),
    **_each(
        "max_seq_length",
        "max_length is the longest record here, as in run_finetune.py",
        kind=NUMBER,
    ),
    **_each("minimum_eval_times max_evaluate_steps", "every evaluation takes all dev data, at eval_steps", OFF),
    # Precision and speed.
    **_each(
        "amp_master_grad",
        "gradients are scaled and clipped in float32 in any case",
        kind=FLAG,
    ),
    **_each(
        "bf16_full_eval fp16_full_eval",
        "evaluation computes as training does",
        kind=FLAG,
    ),
    **_each("amp_custom_black_list amp_custom_white_list", "paddle's own lists are used", OFF),
    **_each("no_cuda", "use device", OFF),
    **_each("decay_steps", "the schedule ends with the last step", ("0", "-1", "", "none", "null")),
    **_each("offload_optim", "the optimizer's state stays on the device", OFF),
    **_each(
        "flatten_param_grads release_grads to_static use_fast_layer_norm fuse_attention_qkv "
        "fuse_attention_ffn use_fused_rope use_fused_rms_norm use_fused_linear "
        "use_fused_linear_cross_entropy use_fused_dropout_add",
        SPEED,
        kind=FLAG,
    ),
    **_each("use_quick_lora eval_packing", ABSENT, kind=FLAG),
    **_each(
        "refined_recompute",
        SPEED,
    ),
    **_each(
        "recompute_granularity",
        LAYERS,
        kind="full, full_attn, core_attn",
    ),
    **_each(
        "recompute_use_reentrant",
        LAYERS,
        kind=FLAG,
    ),
    **_each("no_recompute_layers offload_recompute_inputs", "recompute is of all layers, on the device", OFF),
    # The model.
    **_each("continue_training", "the model's weights are always loaded", ("true", "yes", "on", "1")),
    **_each(
        "hidden_dropout_prob attention_probs_dropout_prob",
        "these model families have no dropout",
        kind=NUMBER,
    ),
    **_each("model_init_kwargs", "config.json says all", OFF),
    **_each(
        "lokr lokr_path prefix_tuning prefix_path reft use_mora lora_use_mixer use_ssa use_long_sequence_strategies "
        "strategy_type strategy_name",
        "no installed plugin offers this technique",
        OFF,
    ),
    **_each(
        "lokr_dim num_prefix_tokens ssa_group_size_ratio weight_double_quant_block_size",
        ABSENT,
        kind=NUMBER,
    ),
    **_each("rope_scaling_factor", "config.json says how positions are scaled", ("1.0", "1")),
}


def explain(
    values: Mapping[str, Any], known: set[str], answered: Mapping[str, Foreign] | None = None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without the names of the table, and what was there: ("name value", reason).

    Names in ``known`` belong to someone. ``answered`` are the rows of active plugins. Raises :class:`UsageError` for a
    value that is not harmless.
    """
    left, found = {}, []
    for name, value in values.items():
        foreign = (answered or {}).get(name) or FOREIGN.get(name)
        if foreign is None or name in known:
            left[name] = value
            continue
        text = str(value).strip().lower()
        if foreign.harmless is None and not foreign.accepts(text):
            raise UsageError(f"{name}: expected {foreign.kind}, got {value!r}.")
        if foreign.harmless is not None and text not in foreign.harmless:
            raise UsageError(
                f"{name} {value!r} is not possible here: {foreign.reason}; take it out{of_absent_plugin()}."
            )
        found.append((f"{name} {str(value).lower() if isinstance(value, bool) else value}", foreign.reason))
    return left, found


def listing(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The warning: one line a reason, with the settings that it is the reason for."""
    by_reason: dict[str, list[str]] = {}
    for setting, reason in pairs:
        by_reason.setdefault(reason, []).append(setting)
    lines = [f"  {', '.join(settings)}: {reason}" for reason, settings in by_reason.items()]
    return ["settings without effect here:", *lines]
