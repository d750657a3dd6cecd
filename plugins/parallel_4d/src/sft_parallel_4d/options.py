"""The settings of plugin ``parallel-4d``."""

from __future__ import annotations

from dataclasses import dataclass

import sft


@dataclass
class ParallelOptions:
    tensor_parallel_degree: int = sft.option(1, "processes that share each layer; -1: one", minimum=-1)
    pipeline_parallel_degree: int = sft.option(1, "stages of consecutive layers; -1: one", minimum=-1)
    sharding: str | None = sft.option(
        None, "what data ranks keep in pieces: stage1 (optimizer), stage2 (gradients too) or stage3 (weights too); "
        "offload beside it: the pieces rest in the host's memory"
    )  # fmt: skip
    sharding_parallel_degree: int = sft.option(
        -1, "data ranks that share pieces; -1: all of them", minimum=-1, aliases=("sharding_degree",)
    )
    sequence_parallel: bool = sft.option(False, "divide the residual stream along the tensor parallel processes too")
    nproc: int = sft.option(1, "start this many processes on this machine", minimum=1)
    parallel_timeout: float = sft.option(600.0, "seconds of waiting after which a missing process is named", above=0)
