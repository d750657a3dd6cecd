"""``sft plan``: what each way of dividing a run among devices needs, from ``config.json`` and settings alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

import sft
from sft import UsageError
from sft_parallel_4d.checks import stage_and_offload
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.paper import NAME, outline
from sft_parallel_4d.plans import Wanted, legal_plans
from sft_parallel_4d.ranking import Answer, Device, ranked

if TYPE_CHECKING:
    from sft import Settings

SHARE = 1024
"""Tokens of a row that a plan leaves each rank that shares it, unless others are asked for."""
DEGREE = click.IntRange(min=1)


def _names(name: str, parameter: str | None = None) -> tuple[str, ...]:
    return (f"--{name}", f"--{name.replace('_', '-')}", parameter or name)


@click.command(
    name="plan",
    cls=sft.SettingsCommand,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.option("--devices", type=DEGREE, required=True, help="How many devices there are.")
@click.option(*_names("device_memory"), required=True, help="The memory of one, such as 80GiB.")
@click.option(*_names("rows_per_step"), type=DEGREE, help="Rows of an optimizer step over all devices.  [default: "
              "per_device_train_batch_size x gradient_accumulation_steps x devices]")  # fmt: skip
@click.option(*_names("device_tflops", "tflops"), type=click.FloatRange(min=0, min_open=True), default=200.0,
              show_default=True, help="10^12 operations a second of one device; for the order.")  # fmt: skip
@click.option("--bandwidth", default="50GB", show_default=True, help="Bytes a second that one sends; for the order.")
@click.option("--top", type=DEGREE, default=20, show_default=True, help="How many plans to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a plan, in bytes, all of them.")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def command(
    devices: int, device_memory: str, rows_per_step: int | None, tflops: float, bandwidth: str, top: int,
    as_json: bool, settings: tuple[str, ...],
) -> None:  # fmt: skip
    """Say how a run fits on devices, before there are any.

    SETTINGS are those of `sft run`: a file, --plugin NAME, --name value; model_name_or_path is needed. Of the model
    only config.json is read. Rows are taken to be full: max_length tokens, each of them a target.

    Only plans are shown that have what the settings give of --tensor_parallel_degree, --pipeline_parallel_degree,
    --virtual_pp_degree, --context_parallel_degree, --sharding (stage2, or "stage2 offload"),
    --sharding_parallel_degree, --sequence_parallel and --recompute; a degree of -1 leaves it open.
    """
    paper = outline(sft.collect(list(settings)))
    for line in paper.notes:
        click.echo(line, err=True)
    training, length = paper.run.settings.training, paper.run.settings.data.max_length
    if length > paper.outline.positions:
        raise UsageError(
            f"max_length is {length} and the model reads {paper.outline.positions} tokens; set it to at most that."
        )
    batch = training.per_device_train_batch_size
    rows = rows_per_step or batch * training.gradient_accumulation_steps * devices
    plans = legal_plans(paper.outline, devices, rows, batch, wanted(paper.run.settings))
    device = Device(sft.parse_size(device_memory), tflops * 1e12, sft.parse_size(bandwidth))
    calculator = Calculator(
        paper.outline, precision_of(paper.run.settings), batch, length, device_memory=sft.parse_size(device_memory)
    )
    answers = ranked(calculator, plans, device)
    if as_json:
        _print_json(answers)
        return
    fitting = sum(answer.fits for answer in answers)
    parameters, trained = paper.outline.count()
    click.echo(
        f"{parameters:,} parameters, {trained:,} train; a step of {rows:,} rows of {length:,} tokens, "
        f"{batch} a micro-batch, on {devices:,} devices of {device_memory}"
    )
    click.echo(f"{len(answers):,} legal plans, {fitting:,} fit" + ("" if fitting else "; the smallest first:"))
    click.echo("\n".join(_table(answers[:top])))
    click.echo(
        f"GiB of the fullest rank, GiB that the busiest rank sends in a step. Order: seconds, estimated at {tflops:g} "
        f"TFLOP/s and {bandwidth}/s a device, nothing overlapping. docs/plan.md has the formulas."
    )


def precision_of(settings: Settings) -> Precision:
    """As a run on a GPU has it: with 16 bits, frozen matrices have 16 unless O1 is typed, and with O2 all weights."""
    training = settings.training
    if not (training.bf16 or training.fp16):
        return Precision()
    level = training.fp16_opt_level if "fp16_opt_level" in settings.given else None
    return Precision(16 if level == "O2" else 32, 16, 32 if level == "O1" else 16)


def wanted(settings: Settings) -> Wanted:
    """What the settings of a run decide about its plan."""
    options, given = settings.options[NAME], settings.given
    stage, offload = stage_and_offload(options.sharding)

    def degree(name: str) -> int | None:
        value = int(getattr(options, name))
        return value if name in given and value > 0 else None

    return Wanted(
        tensor=degree("tensor_parallel_degree"),
        pipeline=degree("pipeline_parallel_degree"),
        sharding=degree("sharding_parallel_degree"),
        context=degree("context_parallel_degree"),
        most_context=max(1, settings.data.max_length // SHARE),
        stage=stage or None,
        sequence=options.sequence_parallel if "sequence_parallel" in given else None,
        recompute=settings.training.recompute if "recompute" in given else None,
        offload=offload,
        virtual=options.virtual_pp_degree,
    )


def _table(answers: list[Answer]) -> list[str]:
    offloads = any(answer.plan.offload for answer in answers)
    head = "data sharding context tensor pipeline seq recompute accumulate weights gradients optimizer activations"
    rows = [[*head.split(), "logits", "peak", *(["host"] if offloads else []), "sent", "seconds", "fits"]]
    for answer in answers:
        plan, memory = answer.plan, answer.memory
        stage = f"{plan.sharding} (stage{plan.stage})" if plan.stage else "1"
        sizes = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.peak]
        sizes += [memory.host] if offloads else []
        rows.append(
            [str(plan.data), stage, *map(str, (plan.context, plan.tensor, plan.pipeline)), _yes(plan.sequence)]
            + [_yes(plan.recompute), str(plan.accumulation), *map(_gib, sizes), _gib(answer.volume.total)]
            + [f"{answer.seconds:.3g}", _yes(answer.fits)]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _print_json(answers: list[Answer]) -> None:
    import json

    for answer in answers:
        record: dict[str, Any] = asdict(answer)
        record["volume"]["total"] = answer.volume.total
        click.echo(json.dumps(record))
