"""Plugin ``parallel-4d``: a run on several processes, and ``sft plan``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    import click

    from sft import ParallelStrategy, Run

STAGES = ("stage1", "stage2", "stage3")


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


class Parallel4d(sft.Plugin):
    """Data, sharding (stages 1 to 3), tensor with sequence, and pipeline parallelism, and their combinations.

    Data parallelism takes what the other degrees leave of the processes.
    """

    name = "parallel-4d"
    summary = "Divide a run among processes: data, sharding, tensor, sequence and pipeline parallelism; sft plan."
    reference = "arXiv 1909.08053, 1910.02054, 1811.06965, 2205.05198"
    Options = ParallelOptions

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_parallel_4d.command import command

        cli.add_command(command)

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        from sft_parallel_4d.checks import check

        self.plan = check(run, self.options, processes(self.options))
        if rank() > 0:
            run.say = lambda text: None

    @sft.hookimpl
    def sft_parallel_strategy(self, run: Run) -> ParallelStrategy:
        from sft_parallel_4d.strategy import Parallel
        from sft_parallel_4d.topology import connect

        return Parallel(run, connect(self.plan))


def processes(options: ParallelOptions) -> int:
    """How many processes share the run: as the launcher says, or as one is going to be asked for."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or options.nproc)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0)


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return bool(os.environ.get("PADDLE_TRAINERS_NUM"))
