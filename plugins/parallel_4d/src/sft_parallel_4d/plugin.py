"""Plugin ``parallel-4d``: a run on several processes, and ``sft plan``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sft
from sft.models.source import is_hub_name
from sft.plugins.discovery import installed

if TYPE_CHECKING:
    import click

    from sft import ParallelStrategy, Run, Summary
    from sft_parallel_4d.plans import Plan
    from sft_parallel_4d.watch import Watch

FOLDER = "SFT_LAUNCH_DIR"
"""Where ``--nproc`` started this process: the environment variable with the folder of that launch."""


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
    api_version = 1
    summary = "Divide a run among processes: data, sharding, tensor, sequence and pipeline parallelism; sft plan."
    reference = "arXiv 1909.08053, 1910.02054, 1811.06965, 2205.05198"
    Options = ParallelOptions

    def __init__(self, options: ParallelOptions) -> None:
        super().__init__(options)
        self.watch: Watch | None = None
        self.plan: Plan | None = None

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_parallel_4d.command import command

        cli.add_command(command)

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        from sft_parallel_4d.checks import check_settings, plan_for

        world, nproc = processes(self.options), self.options.nproc
        if nproc > 1 and nproc != world and FOLDER not in os.environ:
            raise sft.UsageError(
                f"nproc is {nproc}, and a launcher has started {world} of this program; leave one of them out."
            )
        check_settings(run, self.options, world)
        self.plan = None
        if not is_hub_name(str(run.settings.model.model_name_or_path)):
            self.plan = plan_for(run, self.options, world)
        if rank() > 0:
            run.say = lambda text: None

    @sft.hookimpl
    def sft_launch(self, run: Run) -> Summary | None:
        if self.plan is None:  # a model of the hub, whose config.json a check must not wait for
            from sft_parallel_4d.checks import plan_for

            self.plan = plan_for(run, self.options, processes(self.options))
        if self.options.nproc == 1 or is_launched():
            return None
        here = [name for name in run.plugins.names if name not in installed()]
        if here:
            raise sft.UsageError(
                f"Plugin {', '.join(here)} was given as a class, which processes that nproc starts cannot find; let a "
                "distribution provide it, or start the program with python -m paddle.distributed.launch."
            )
        from sft_parallel_4d.launch import launch

        launch(run.given, self.options.nproc, run.say)
        result = json.loads((run.output_dir / "run.json").read_text(encoding="utf-8"))["result"]
        return sft.Summary(**{**result, "output_dir": Path(result["output_dir"])})

    @sft.hookimpl
    def sft_parallel_strategy(self, run: Run) -> ParallelStrategy:
        from sft.training.report import close_report
        from sft_parallel_4d.launch import report
        from sft_parallel_4d.strategy import Parallel
        from sft_parallel_4d.topology import connect

        assert self.plan is not None  # since sft_launch
        if self.options.sharding and not self.plan.stage:
            run.say(f"note: sharding {self.options.sharding} divides nothing: one process reads all records")
        if self.plan.devices > 1:
            from sft_parallel_4d.watch import Watch

            def ends(text: str) -> None:
                close_report(run, sft.SftError(text))
                report(text)

            self.watch = Watch(rank(), self.plan.devices, self.options.parallel_timeout, ends)
            self.watch.start()
        return Parallel(run, connect(self.plan), self.watch)

    @sft.hookimpl
    def sft_run_ended(self, run: Run, summary: Summary) -> None:
        if self.watch is not None:
            try:
                self.watch.stop()
            except sft.SftError as error:  # another process did not come to its end
                from sft_parallel_4d.launch import record

                record(error)
                raise
        if FOLDER in os.environ:
            summary.speaks = False  # the process that started this one does

    @sft.hookimpl(trylast=True)  # it may end this process
    def sft_run_failed(self, run: Run, error: BaseException) -> None:
        if is_launched():
            from sft_parallel_4d.launch import failed

            failed(error, rank(), self.watch)


def processes(options: ParallelOptions) -> int:
    """How many processes share the run: as the launcher says, or as one is going to be asked for."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or options.nproc)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0)


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return bool(os.environ.get("PADDLE_TRAINERS_NUM"))
