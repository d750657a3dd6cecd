"""The settings of plugin ``parallel-4d``."""

from __future__ import annotations

from dataclasses import dataclass

import sft

BUCKET = 1 << 27
"""Bytes of float32 gradients that travel together, if no setting says otherwise: all those of a usual adapter."""


@dataclass
class ParallelOptions:
    tensor_parallel_degree: int = sft.option(1, "processes that share each layer; -1: one", minimum=-1)
    pipeline_parallel_degree: int = sft.option(1, "stages of consecutive layers; -1: one", minimum=-1)
    virtual_pp_degree: int = sft.option(
        1, "parts of the model that each stage has, which shortens the time in which stages wait for each other "
        "(interleaved 1F1B); 1: one run of layers", minimum=1, aliases=("virtual_pipeline_degree",)
    )  # fmt: skip
    context_parallel_degree: int = sft.option(
        1, "processes that share the tokens of each row; -1: one", minimum=-1, aliases=("sep_parallel_degree",)
    )
    sharding: str | None = sft.option(
        None, "what data ranks keep in pieces: stage1 (optimizer), stage2 (gradients too) or stage3 (weights too); "
        "offload beside it: the pieces rest in the host's memory"
    )  # fmt: skip
    sharding_parallel_degree: int = sft.option(
        -1, "data ranks that share pieces; -1: all of them", minimum=-1, aliases=("sharding_degree",)
    )
    expert_parallel_degree: int = sft.option(
        1, "ranks with the same pieces that share out the experts of a mixture model; -1: one", minimum=-1
    )
    sequence_parallel: bool = sft.option(False, "divide the residual stream along the tensor parallel processes too")
    sharding_comm_buffer_size_MB: int = sft.option(  # noqa: N815  (the name that PaddleNLP has)
        -1, "MiB of float32 gradients that travel together while backward goes on, but for matrices in stage3; -1: 128",
        minimum=-1,
    )  # fmt: skip
    nproc: int | str = sft.option(
        1, "start this many processes on this machine; auto: one on each GPU that it has", choices=("auto",), minimum=1,
        maximum=1024,
    )  # fmt: skip
    max_restarts: int = sft.option(
        0, "how often a run that nproc starts goes on with fewer processes when some of them were killed", minimum=0
    )
    parallel_timeout: float = sft.option(600.0, "seconds of waiting after which a missing process is named", above=0)

    @property
    def bucket(self) -> int:
        """Bytes of gradients that travel together."""
        size = self.sharding_comm_buffer_size_MB
        return size << 20 if size > 0 else BUCKET


def _tuning(kind: str, names: str) -> dict[str, sft.Foreign]:
    return dict.fromkeys(
        names.split(), sft.Foreign("how processes exchange data is not tuned by settings here", None, kind)
    )


ANSWERED = {
    **_tuning(
        "text",
        "sharding_parallel_config tensor_parallel_config pipeline_parallel_config sequence_parallel_config "
        "data_parallel_config hybrid_parallel_topo_order",
    ),
    **_tuning("dp", "sharding_parallel_mesh_dimension"),
    **_tuning(
        "a number",
        "expert_max_capacity expert_min_capacity pp_recompute_interval ordered_save_group_size local_rank",
    ),
    **_tuning(
        "true or false",
        "fuse_sequence_parallel_allreduce split_inputs_sequence_dim ddp_find_unused_parameters tensor_parallel_output "
        "distributed_dataloader force_reshard_pp save_sharding_stage1_model_include_freeze_params "
        "auto_parallel_resume_form_hybrid_parallel log_on_each_node save_on_each_node",
    ),
}
"""PaddleNLP's settings that mean nothing where processes share a run; the core has them where there is one process."""
