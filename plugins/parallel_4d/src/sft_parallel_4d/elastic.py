"""A run of several processes that loses some goes on with those that remain (``--max_restarts``).

A rank is lost when the system ends it: ``kill -9``, want of memory, a crash. What a rank says itself (settings that it
refuses, a loss that is not finite, memory that its GPU lacks) would come again, and ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import SftError, UsageError, read_report
from sft_parallel_4d.launch import LostError, launch
from sft_parallel_4d.machines import DEFAULT, MACHINES
from sft_parallel_4d.options import ParallelOptions
from sft_parallel_4d.paper import outline, with_this_plugin
from sft_parallel_4d.plans import Plan, Wanted, settings_of
from sft_parallel_4d.ranking import ranked
from sft_parallel_4d.reckoning import SHARE, accepted_plans, calculator_of

if TYPE_CHECKING:
    from sft import Run

SAME = (
    "the weights and the optimizer's state of that step",
    "the records of every step and their order",
    "rows a step, learning rates and the number of steps",
)
CLOSE = (
    "losses, gradient norms and weights from that step on: sums are taken in another order (to 1e-5 in float32; as far "
    "as the run's own precision goes with 16 bits)",
)
OTHER = (
    "what is drawn: dropout and noise are as with another seed",
    "steps behind the checkpoint, which are taken again",
)
"""What a restart keeps to the bit, what only nearly, and what not."""
_NOT_NAMED = ("", "none", "null", "false", "true", "auto")


def run_elastic(run: Run, plan: Plan, nproc: int, restarts: int) -> None:
    """Launch ``run`` in ``nproc`` processes under ``plan``, and again with fewer whenever ranks were killed, up to
    ``restarts`` times. Raises as :func:`launch` does, when these are used up or there is nothing to go on with."""
    values, before, events = dict(run.given), read_report(run.output_dir), list[dict[str, Any]]()
    used = list[str]()  # the launcher takes the first ones
    devices = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one] or [*map(str, range(nproc))]
    while True:
        try:
            launch(values, nproc, run.progress.relay, used, events)
            return
        except LostError as lost:
            if len(events) >= restarts or len(lost.ranks) >= nproc:
                raise
            report = read_report(run.output_dir)
            if report != before and report.get("status") == "finished":
                raise
            left = nproc - len(lost.ranks)
            new = _chosen(run, plan, left, lost)
            devices = [one for number, one in enumerate(devices) if number not in lost.ranks]
            used = devices[: new.devices] if lost.memory is not None else []
            values = _under(_resuming(values, run.output_dir, report != before), new)
            event = {
                "at": datetime.now().astimezone().isoformat(timespec="seconds"),
                "lost": list(lost.ranks),
                "of": nproc,
                "error": str(lost).partition("\n")[0],
                "old_plan": asdict(plan),
                "new_plan": asdict(new),
                "rows_per_step": rows_of(run, plan),
                "left_out": left - new.devices,
                "same_to_the_bit": list(SAME),
                "the_same_to_1e-5": list(CLOSE),
                "not_the_same": list(OTHER),
            }
            events.append(event)
            run.say(f"{event['error']} Starting again, {len(events)} of {restarts} times: {new} instead of {plan}")
            nproc, plan = new.devices, new


def rows_of(run: Run, plan: Plan) -> int:
    """Rows of a step under ``plan``."""
    return run.settings.training.per_device_train_batch_size * plan.accumulation * plan.data_world


def _chosen(run: Run, old: Plan, left: int, lost: LostError) -> Plan:
    """What ``sft plan`` would choose for up to ``left`` devices and the same rows a step: of the plans that fit, those
    that divide in ways that the run already has, whose model and settings have been seen to go with them; of these
    those with most processes; of these the quickest. The memory is that of the GPUs here; what is quick is reckoned
    with the speeds of the default machine, for nothing here tells those of these GPUs."""
    paper = outline(run.given)
    settings = paper.run.settings
    batch, rows = settings.training.per_device_train_batch_size, rows_of(run, old)
    length = min(settings.data.max_length, paper.outline.positions)
    calculator = calculator_of(paper, batch, length, lost.memory)
    most = max(old.context, settings.data.max_length // SHARE)  # as sft plan offers, or as the run already has
    wanted = Wanted(recompute=settings.training.recompute or None, offload=old.offload, most_context=most)
    found = []
    for devices in range(left, 0, -1):
        try:
            plans = accepted_plans(paper, devices, rows, batch, wanted)
        except UsageError:
            continue
        memory = _memory(devices) if lost.memory is None else lost.memory
        found += ranked(calculator, plans, replace(MACHINES[DEFAULT], memory=memory))
    fitting = [answer for answer in found if answer.fits]
    if not fitting:
        why = f"none of their plans keeps {rows} rows a step" if not found else "no plan fits into their memory"
        raise SftError(f"{lost} Of {left} processes that remain {why}, so the run ends here.") from lost
    best = min(fitting, key=lambda answer: (not _is_known(answer.plan, old), -answer.plan.devices))
    return best.plan  # of equals the first one, which is the quickest


def _is_known(plan: Plan, old: Plan) -> bool:
    return (
        (plan.tensor == 1 or old.tensor > 1)
        and (plan.pipeline == 1 or old.pipeline > 1)
        and (plan.context == 1 or old.context > 1)
        and (plan.experts == 1 or old.experts > 1)
        and plan.stage in (0, old.stage)
        and (old.sequence or not plan.sequence)
    )


def _memory(processes: int) -> int:
    """Of a CPU's process, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def _resuming(values: Mapping[str, Any], folder: Path, begun: bool) -> dict[str, Any]:
    """The settings with which the run goes on, from the newest checkpoint that is whole; where it had not ``begun`` to
    write its folder, or has no checkpoint yet, from where it began."""
    found = dict(values)
    if not begun:
        return found
    asked = found.get("resume_from_checkpoint")
    is_named = str("" if asked is None else asked).lower() not in _NOT_NAMED
    if is_named and not any(folder.glob("checkpoint-*")):
        return {**found, "overwrite_output_dir": True}
    found.pop("overwrite_output_dir", None)
    return {**found, "resume_from_checkpoint": "auto"}


def _under(values: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """``values`` with those that ask for ``plan``, by no other name either."""
    asked = settings_of(plan)
    other = {alias for one in fields(ParallelOptions) if one.name in asked for alias in one.metadata["aliases"]}
    return with_this_plugin({**{name: value for name, value in values.items() if name not in other}, **asked})
