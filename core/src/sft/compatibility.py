"""PaddleNLP's settings that mean nothing here: each is named with the reason when a run begins, none is just accepted.

The table is asked for names that neither the core nor an active plugin declares. Most names are harmless at some
values alone, at which PaddleNLP does what sft does; at others the run would not be what the file asks for, and that is
an error. Names are those of ``run_finetune.py`` in paddlenlp 3.0.0b4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sft.errors import UsageError
from sft.options import convert, options_of
from sft.plugins import Plugins, import_plugin
from sft.settings import known_names


@dataclass(frozen=True)
class Foreign:
    """Why a setting has no effect; ``harmless`` are the values of which that is true (None: all of its ``kind``)."""

    reason: str
    harmless: tuple[str, ...] | None = None

    @staticmethod
    def kind(name: str) -> str:
        """What PaddleNLP expects: "true or false", "a number", "text"."""
        if name in _FLAGS:
            return "true or false"
        return "a number" if name in _NUMBERS else "text"

    def accepts(self, name: str, text: str) -> bool:
        """Whether PaddleNLP would take ``text`` for ``name``; an unset value always."""
        if text in ("", "none", "null"):
            return True
        if name in _CHOICES:
            return all(part in _CHOICES[name] for part in text.replace(",", " ").split())
        kind = self.kind(name)
        if kind == "true or false":
            return text in ("true", "false", "yes", "no", "on", "off", "1", "0")
        return kind == "text" or text.lstrip("+-").replace(".", "", 1).isdigit()


OFF = ("", "none", "null", "false", "no", "off", "0", "-1")
ALONE = (*OFF, "1")


# Of the names below that are harmless whatever their value, what PaddleNLP takes for one.
_FLAGS = frozenset(
    """fuse_sequence_parallel_allreduce split_inputs_sequence_dim ddp_find_unused_parameters tensor_parallel_output
    distributed_dataloader force_reshard_pp save_sharding_stage1_model_include_freeze_params
    auto_parallel_resume_form_hybrid_parallel log_on_each_node save_on_each_node unified_checkpoint use_async_save
    save_sharded_model load_sharded_model save_generation_output skip_profile_timer skip_memory_metrics
    count_trained_tokens logging_first_step aistudio_repo_private pdc_download_ckpt remove_unused_columns
    lazy_data_processing pad_to_max_length amp_master_grad bf16_full_eval fp16_full_eval recompute_use_reentrant
    flatten_param_grads release_grads to_static use_fast_layer_norm fuse_attention_qkv fuse_attention_ffn use_fused_rope
    use_fused_rms_norm use_fused_linear use_fused_linear_cross_entropy use_quick_lora use_fused_dropout_add""".split()
)
_NUMBERS = frozenset(
    """sharding_comm_buffer_size_MB expert_max_capacity expert_min_capacity pp_recompute_interval
    ordered_save_group_size local_rank pdc_download_timeout eval_accumulation_steps dataloader_num_workers
    dataset_num_proc dataset_batch_size past_index pad_to_multiple_of pad_token_id max_seq_length
    hidden_dropout_prob attention_probs_dropout_prob lokr_dim num_prefix_tokens ssa_group_size_ratio""".split()
)
_CHOICES = {
    "sharding": ("stage1", "stage2", "stage3", "offload"),
    "sharding_parallel_mesh_dimension": ("dp",),
    "recompute_granularity": ("full", "full_attn", "core_attn"),
    "ckpt_quant_stage": ("o0", "o1", "o2"),
}


def _each(names: str, reason: str, harmless: tuple[str, ...] | None = None) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign(reason, harmless))


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
        "sharding sharding_parallel_config sharding_parallel_mesh_dimension sharding_comm_buffer_size_MB "
        "tensor_parallel_config pipeline_parallel_config sequence_parallel_config data_parallel_config "
        "hybrid_parallel_topo_order fuse_sequence_parallel_allreduce split_inputs_sequence_dim "
        "ddp_find_unused_parameters tensor_parallel_output distributed_dataloader expert_max_capacity "
        "expert_min_capacity pp_recompute_interval "
        "ordered_save_group_size force_reshard_pp save_sharding_stage1_model_include_freeze_params "
        "auto_parallel_resume_form_hybrid_parallel log_on_each_node save_on_each_node local_rank",
        "it is about several processes, and this run has one",
    ),
    # Checkpoints and what is written.
    **_each(
        "unified_checkpoint unified_checkpoint_config use_async_save ckpt_quant_stage save_sharded_model "
        "load_sharded_model",
        "checkpoints are always whole safetensors, readable under any plan",
    ),
    **_each(
        "ignore_save_lr_and_optim ignore_load_lr_and_optim ignore_data_skip",
        "a checkpoint always holds, and a resumed run always takes, the optimizer and its place in the data",
        OFF,
    ),
    **_each("skip_data_intervals", "no step's data can be skipped", OFF),
    **_each("save_generation_output", "generations of an evaluation are always saved"),
    **_each(
        "logging_dir report_to run_name wandb_api_key wandb_http_proxy metrics_output_path output_signal_dir "
        "skip_profile_timer skip_memory_metrics count_trained_tokens",
        "a run logs to its own metrics.jsonl and run.json",
    ),
    **_each("logging_strategy", "lines are logged every logging_steps", ("steps",)),
    **_each("logging_first_step", "the first step is always logged"),
    **_each("do_predict do_export prediction_loss_only", "a run trains and evaluates", OFF),
    **_each("benchmark autotuner_benchmark", "a run is not a benchmark", OFF),
    **_each("from_aistudio save_to_aistudio", "models come from a directory or the Hugging Face hub", OFF),
    **_each(
        "aistudio_repo_id aistudio_repo_private aistudio_repo_license aistudio_token pdc_download_ckpt "
        "pdc_download_timeout",
        "models come from a directory or the Hugging Face hub",
    ),
    # Data.
    **_each("eval_accumulation_steps", "evaluation adds up sums batch by batch and keeps no predictions"),
    **_each(
        "dataloader_num_workers remove_unused_columns lazy_data_processing dataset_num_proc dataset_batch_size "
        "label_names past_index",
        "data is read and encoded in this process",
    ),
    **_each("dataloader_drop_last", "no record is dropped at the end of an epoch", OFF),
    **_each("pad_to_multiple_of pad_to_max_length", "rows are padded to the longest of their batch: the same losses"),
    **_each("pad_token_id", "padding is masked, so its id does not matter"),
    **_each("task_name dataset_kwargs", "dataset_name_or_path says all", OFF),
    **_each("autoregressive use_pose_convert", "only targets of conversations are trained", OFF),
    **_each("dataset_text_field", "records are conversations", ("", "none", "null", "text")),
    **_each("max_seq_length", "max_length is the longest record here, as in run_finetune.py"),
    **_each("eval_packing", "dev data is packed as training data is", ("", "none", "null")),
    **_each("minimum_eval_times max_evaluate_steps", "every evaluation takes all dev data, at eval_steps", OFF),
    # Precision and speed.
    **_each("amp_master_grad", "gradients are scaled and clipped in float32 in any case"),
    **_each("bf16_full_eval fp16_full_eval", "evaluation computes as training does"),
    **_each("amp_custom_black_list amp_custom_white_list", "paddle's own lists are used", OFF),
    **_each("no_cuda", "use device", OFF),
    **_each("optim", "AdamW is the optimizer", ("adamw",)),
    **_each("decay_steps", "the schedule ends with the last step", ("0", "-1", "", "none", "null")),
    **_each("offload_optim", "the optimizer's state stays on the device", OFF),
    **_each(
        "flatten_param_grads release_grads to_static refined_recompute use_fast_layer_norm fuse_attention_qkv "
        "fuse_attention_ffn use_fused_rope use_fused_rms_norm use_fused_linear use_fused_linear_cross_entropy "
        "use_quick_lora use_fused_dropout_add",
        "it changes the speed of PaddleNLP's code, not the result",
    ),
    **_each("recompute_granularity recompute_use_reentrant", "recompute is of whole layers: the same result"),
    **_each("no_recompute_layers offload_recompute_inputs", "recompute is of all layers, on the device", OFF),
    # The model.
    **_each("continue_training", "the model's weights are always loaded", ("true", "yes", "on", "1")),
    **_each("hidden_dropout_prob attention_probs_dropout_prob", "these model families have no dropout"),
    **_each("model_init_kwargs", "config.json says all", OFF),
    **_each(
        "lokr lokr_path prefix_tuning prefix_path reft use_mora lora_use_mixer use_ssa use_long_sequence_strategies "
        "strategy_type strategy_name",
        "no installed plugin offers this technique",
        OFF,
    ),
    **_each("lokr_dim num_prefix_tokens ssa_group_size_ratio", "it belongs to a technique that is off"),
    **_each("rope_scaling_factor", "config.json says how positions are scaled", ("1.0", "1")),
    **_each("weight_double_quant_block_size", "blocks of doubly quantized absmax have 256 values", ("256",)),
}


def explain(values: Mapping[str, Any], known: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without the names of the table, and what was there: ("name value", reason).

    Names in ``known`` belong to someone. Raises :class:`UsageError` for a value that is not harmless.
    """
    left, found = {}, []
    for name, value in values.items():
        foreign = FOREIGN.get(name)
        if foreign is None or name in known:
            left[name] = value
            continue
        text = str(value).strip().lower()
        if foreign.harmless is None and not foreign.accepts(name, text):
            expected = "one of " + ", ".join(_CHOICES[name]) if name in _CHOICES else foreign.kind(name)
            raise UsageError(f"{name}: expected {expected}, got {value!r}.")
        if foreign.harmless is not None and text not in foreign.harmless:
            raise UsageError(f"{name} {value!r} is not possible here: {foreign.reason}; take it out.")
        found.append((f"{name} {str(value).lower() if isinstance(value, bool) else value}", foreign.reason))
    return left, found


def of_idle_plugins(
    values: Mapping[str, Any], active: Plugins, off: Iterable[str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without options of plugins that are not active, and those options with the reason.

    Of the plugins in ``off``, which a setting switches off, that is any option; of the others, one that has its default
    (PaddleNLP's files are full of them). Another value asks for a plugin, and is left for the error that says so.
    """
    known, idle = known_names(active), {}
    unknown = [key for key in values if key not in known]
    # Only what a name points to is imported.
    named = [name for name in active.inactive() if any(key.startswith(name.replace("-", "_") + "_") for key in unknown)]
    for name in dict.fromkeys([*off, *named]):
        declared = getattr(import_plugin(name), "Options", None)
        for found in options_of(declared).values() if declared is not None else ():
            for key in (found.name, *found.aliases):
                if key not in values or key in known:
                    continue
                if name in off:
                    idle[key] = f"plugin {name} is switched off"
                elif convert(found, values[key]) == found.default:
                    idle[key] = f"it is the default of plugin {name}, which is not asked for"
    pairs = [(f"{key} {values[key]}", idle[key]) for key in values if key in idle]
    return {key: value for key, value in values.items() if key not in idle}, pairs


def listing(pairs: Iterable[tuple[str, str]]) -> str:
    """The warning: one line a reason, with the settings that it is the reason for."""
    by_reason: dict[str, list[str]] = {}
    for setting, reason in pairs:
        by_reason.setdefault(reason, []).append(setting)
    lines = [f"{', '.join(settings)}: {reason}" for reason, settings in by_reason.items()]
    return "\n  ".join(["settings without effect here:", *lines])
