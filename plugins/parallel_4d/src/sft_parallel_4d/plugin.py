"""Plugin ``parallel-4d``: a run on several processes, and ``sft plan``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import sft
from sft_parallel_4d import hooks
from sft_parallel_4d.door import TOKEN, token
from sft_parallel_4d.environment import FOLDER, asked_for, gpu_memory, is_launched, processes, rank
from sft_parallel_4d.options import ANSWERED, ParallelOptions

if TYPE_CHECKING:
    import click

    from sft import ParallelStrategy, Run, Summary
    from sft_parallel_4d.plans import Plan
    from sft_parallel_4d.watch import Watch


class Parallel4d(sft.Plugin):
    """Data, sharding (stages 1 to 3), tensor with sequence, pipeline, context and expert parallelism, and their
    combinations.

    Data parallelism takes what the other degrees leave of the processes.
    """

    name = "parallel-4d"
    api_version = ">=1.1,<2"
    summary = "Divide a run among processes: data, sharding, tensor, sequence, pipeline, context, experts; sft plan."
    reference = "arXiv 1909.08053, 1910.02054, 1811.06965, 2205.05198, 2309.14509, 2006.16668"
    Options = ParallelOptions
    paddlenlp: ClassVar[dict[str, sft.Foreign]] = ANSWERED
    hookspecs = hooks

    def __init__(self, options: ParallelOptions) -> None:
        super().__init__(options)
        self.watch: Watch | None = None
        self.plan: Plan | None = None
        self.restarts: list[dict[str, Any]] = []

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_parallel_4d.command import command

        cli.add_command(command)

    @sft.hookimpl
    def sft_memory_advice(self, values: dict[str, Any], device: str, memory: int) -> str | None:
        from sft_parallel_4d.advice import advice

        return advice(values, device, memory)

    @sft.hookimpl
    def sft_memory_need(self, values: dict[str, Any], device: str, memory: int) -> int | None:
        from sft_parallel_4d.advice import need

        return need(values, device, memory)

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        from sft_parallel_4d.checks import check_settings, plan_for

        device = run.settings.training.device
        world, nproc = processes(self.options, device), asked_for(self.options, device)
        if self.options.max_restarts and FOLDER not in os.environ and (is_launched() or self.options.nproc == 1):
            raise sft.UsageError(
                "max_restarts is for runs whose processes nproc starts; add --nproc N (or auto), or leave it out."
            )
        if nproc > 1 and nproc != world and FOLDER not in os.environ:
            raise sft.UsageError(
                f"nproc is {nproc}, and a launcher has started {world} of this program; leave one of them out."
            )
        check_settings(run, self.options, world)
        self.plan = None
        if not sft.is_hub_name(str(run.settings.model.model_name_or_path)):
            self.plan = plan_for(run, self.options, world)
        if rank() > 0:
            run.say = lambda text: None

    @sft.hookimpl
    def sft_launch(self, run: Run) -> Summary | None:
        if self.plan is None:  # a model of the hub, whose config.json a check must not wait for
            from sft_parallel_4d.checks import plan_for

            self.plan = plan_for(run, self.options, processes(self.options, run.settings.training.device))
        nproc = asked_for(self.options, run.settings.training.device)
        if nproc == 1 and self.options.nproc == "auto" and not is_launched():
            run.say("note: nproc auto is one process here, for paddle sees one device")
        if nproc == 1 or is_launched():
            return None
        here = ", ".join(run.plugins.direct)
        if here:
            raise sft.UsageError(
                f"Plugin {here} was given as a class, which processes that nproc starts cannot find; let a "
                "distribution provide it, or start the program with python -m paddle.distributed.launch."
            )
        from sft_parallel_4d.elastic import run_elastic

        run_elastic(run, self.plan, nproc, self.options.max_restarts)
        result = sft.read_report(run.output_dir)["result"]
        return sft.Summary(**{**result, "output_dir": Path(result["output_dir"])})

    @sft.hookimpl
    def sft_parallel_strategy(self, run: Run) -> ParallelStrategy:
        from sft.parallel import close_report
        from sft_parallel_4d.last_words import INTERRUPTED, computes_on, report
        from sft_parallel_4d.strategy import Parallel
        from sft_parallel_4d.topology import connect

        assert self.plan is not None  # since sft_launch
        computes_on(gpu_memory())
        if self.options.sharding and not self.plan.stage:
            from sft_parallel_4d.checks import why_no_pieces

            run.say(f"note: sharding {self.options.sharding} divides nothing: {why_no_pieces(self.plan, self.options)}")
        if self.plan.devices > 1:
            from sft_parallel_4d.watch import Watch

            def ends(text: str, gone: Sequence[int]) -> None:
                close_report(run, KeyboardInterrupt() if text.endswith(f": {INTERRUPTED}") else sft.SftError(text))
                report(text, gone)

            if rank() == 0 and not token():
                run.say(
                    f"note: {TOKEN} is not set, so whoever reaches the ports of this run can end it; set it to the "
                    "same secret text for all ranks"
                )
            self.watch = Watch(rank(), self.plan.devices, self.options.parallel_timeout, ends)
            self.watch.start()
        return Parallel(run, connect(self.plan), self.watch, self.options.bucket)

    @sft.hookimpl
    def sft_state(self, run: Run) -> dict[str, Any]:
        return {"restarts": self.restarts} if self.restarts else {}

    @sft.hookimpl
    def sft_restore(self, run: Run, state: dict[str, Any], why: str, step: int) -> None:
        if why == "resume":
            self.restarts = state["restarts"]

    @sft.hookimpl
    def sft_run_record(self, run: Run) -> dict[str, Any]:
        from sft_parallel_4d.restarts import restarts_before

        known = [event["at"] for event in self.restarts]
        self.restarts += [event for event in restarts_before() if event["at"] not in known]
        for event in self.restarts:
            event.setdefault("from_step", run.step)
        return {"restarts": self.restarts} if self.restarts else {}

    @sft.hookimpl
    def sft_run_started(self, run: Run) -> None:
        from sft_parallel_4d.restarts import line_of, restarts_before

        if rank() == 0 and restarts_before():
            run.say(line_of(self.restarts[-1]))

    @sft.hookimpl
    def sft_run_ended(self, run: Run, summary: Summary) -> None:
        if self.watch is not None:
            try:
                self.watch.stop()
            except sft.SftError as error:  # another process did not come to its end
                from sft_parallel_4d.last_words import record

                record(error)
                raise
        if FOLDER in os.environ:
            summary.speaks = False  # the process that started this one does

    @sft.hookimpl(trylast=True)  # it may end this process
    def sft_run_failed(self, run: Run, error: BaseException) -> None:
        if is_launched():
            from sft_parallel_4d.last_words import failed, stopped

            if isinstance(error, sft.SignalError) and error.moment and self.watch is not None:
                stopped(error.moment)
                self.watch.stop()  # all ranks end here, and none before the main one has written what it writes
                return
            failed(error, rank(), self.watch)
