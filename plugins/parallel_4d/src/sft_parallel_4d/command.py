"""``sft plan``: what each way of dividing a run among devices needs, from ``config.json`` and settings alone."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

import sft
from sft import UsageError
from sft_parallel_4d.machines import DEFAULT, MACHINES, Machine, taken
from sft_parallel_4d.paper import outline
from sft_parallel_4d.ranking import Answer, ranked
from sft_parallel_4d.reckoning import accepted_plans, calculator_of, wanted
from sft_parallel_4d.timeline_page import MADE_BY, write_page
from sft_parallel_4d.timing import BEHIND, Time


class Finite(click.FloatRange):
    """A number that is more than 0, which "inf" and "nan" are not taken for."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", parameter, context)
        return number


DEGREE, POSITIVE, SHARE = click.IntRange(min=1), Finite(min=0, min_open=True), Finite(0, 1, min_open=True)
TIMES = ("computing", "sending", "idle", "step", "hidden")


def _names(name: str, parameter: str | None = None) -> tuple[str, ...]:
    return (f"--{name}", f"--{name.replace('_', '-')}", parameter or name)


@click.command(
    name="plan",
    cls=sft.SettingsCommand,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.option("--devices", type=DEGREE, required=True, help="How many devices there are.")
@click.option("--machine", type=click.Choice(list(MACHINES)), default=DEFAULT, show_default=True,
              help="What a node is; the figures are those of datasheets.")  # fmt: skip
@click.option(*_names("device_memory"), help="The memory of a device, such as 80GiB.  [default: the machine's]")
@click.option(*_names("rows_per_step"), type=DEGREE, help="Rows of an optimizer step over all devices.  [default: "
              "per_device_train_batch_size x gradient_accumulation_steps x devices]")  # fmt: skip
@click.option(*_names("devices_per_node"), type=DEGREE, help="Devices of a node.  [default: the machine's]")
@click.option(*_names("device_tflops", "tflops"), type=POSITIVE,
              help="10^12 operations a second of a device at best.  [default: the machine's]")  # fmt: skip
@click.option("--efficiency", type=SHARE,
              help="The share of these that training gets while it computes.  [default: the machine's]")  # fmt: skip
@click.option("--bandwidth", help="Bytes a second that a device sends to others of its node, such as 300GB.  "
              "[default: the machine's]")  # fmt: skip
@click.option(*_names("node_bandwidth"), help="Bytes a second that a device sends to other nodes.  [default: the "
              "machine's]")  # fmt: skip
@click.option(*_names("memory_bandwidth"), help="Bytes a second that a device has from its own memory, such as 2TB.  "
              "[default: the machine's]")  # fmt: skip
@click.option(*_names("host_bandwidth"), help="Bytes a second that a device sends to the host's memory, and has from "
              "it.  [default: the machine's]")  # fmt: skip
@click.option("--latency", type=POSITIVE, help="Microseconds of a message between nodes.  [default: the "
              "machine's]")  # fmt: skip
@click.option(*_names("device_latency"), type=POSITIVE, help="Microseconds of a message within a node.  [default: the "
              "machine's]")  # fmt: skip
@click.option("--top", type=DEGREE, default=20, show_default=True, help="How many plans to show.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with the time of the first plans, a rank "
              "of each stage, that needs nothing else.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object a plan, in bytes, all of them.")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def command(
    devices: int, machine: str, rows_per_step: int | None, top: int, as_json: bool, html: Path | None,
    settings: tuple[str, ...], **figures: Any,
) -> None:  # fmt: skip
    """Say how a run fits on devices, before there are any.

    SETTINGS are those of `sft run`: a file, --plugin NAME, --name value; model_name_or_path is needed. Of the model
    only config.json is read. Rows are taken to be full: max_length tokens, each of them a target.

    Only plans are shown that have what the settings give of --tensor_parallel_degree, --pipeline_parallel_degree,
    --virtual_pp_degree, --context_parallel_degree, --expert_parallel_degree, --sharding (stage2, or "stage2 offload"),
    --sharding_parallel_degree, --sequence_parallel and --recompute; a degree of -1 leaves it open.
    """
    if html is not None:
        sft.check_html(html, MADE_BY)
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
    plans = accepted_plans(paper, devices, rows, batch, wanted(paper.run.settings))
    here = _machine(MACHINES[machine], **figures)
    of_gpu = None if training.device == "cpu" else here.memory  # a CPU has smaller chunks of logits
    calculator = calculator_of(paper, batch, length, of_gpu)
    answers = ranked(calculator, plans, here)
    if html is not None:
        model = paper.run.settings.model.model_name_or_path
        title = f"{model}: {rows:,} rows of {length:,} tokens a step on {devices:,} devices"
        write_page(html, answers[:top], calculator, here, machine, title)
    if as_json:
        _print_json(answers)
        return
    fitting = sum(answer.fits for answer in answers)
    parameters, trained = paper.outline.count()
    click.echo(
        f"{parameters:,} parameters, {trained:,} train; a step of {rows:,} rows of {length:,} tokens, "
        f"{batch} a micro-batch, on {devices:,} devices of {_gib(here.memory)} GiB, {here.devices} a node"
    )
    click.echo(f"{len(answers):,} legal plans, {fitting:,} fit" + ("" if fitting else "; the smallest first:"))
    click.echo("\n".join(_table(answers[:top])))
    click.echo(
        "GiB of the fullest rank, GiB that the busiest rank sends in a step, and seconds of a step, which is the "
        "order: computing, and waiting for what is sent, for other stages, and for the optimizer; hidden is what is "
        "sent behind computation."
    )
    click.echo(f"Taken of a device: {taken(here, calculator.precision.products)}. What is sent in the first plan:")
    click.echo("\n".join(f"  {line}" for line in sent_in_words(answers[0].time)))
    click.echo("docs/plan.md has the formulas.")


def _machine(
    machine: Machine, *, devices_per_node: int | None, device_memory: str | None, tflops: float | None,
    efficiency: float | None, bandwidth: str | None, node_bandwidth: str | None, memory_bandwidth: str | None,
    host_bandwidth: str | None, latency: float | None, device_latency: float | None,
) -> Machine:  # fmt: skip
    """``machine`` with the user's own figures."""
    sizes = {
        **{"memory": device_memory, "within": bandwidth, "between": node_bandwidth},
        **{"stream": memory_bandwidth, "host": host_bandwidth},
    }
    given: dict[str, Any] = {name: size and sft.parse_size(size) for name, size in sizes.items()}
    if given["memory"] and given["memory"] < 1 << 20:
        raise UsageError(f"A device of {given['memory']:,} bytes holds no model; give a unit, such as 24GiB.")
    given |= {
        **{"devices": devices_per_node, "efficiency": efficiency},
        **dict.fromkeys(("flops", "flops32"), tflops and tflops * 1e12),
        "latency": device_latency and device_latency * 1e-6,
        "far_latency": latency and latency * 1e-6,
    }
    return replace(machine, **{name: value for name, value in given.items() if value is not None})


def sent_in_words(time: Time) -> list[str]:
    """What is sent behind computation, and what is waited for, a line an axis."""
    found = []
    for axis in {**time.exposed, **time.hidden}:
        exposed, hidden = time.exposed.get(axis, 0.0), time.hidden.get(axis, 0.0)
        if exposed + hidden:
            found.append(f"{axis}: {exposed:.3g} s waited for, {hidden:.3g} s behind {BEHIND.get(axis, 'computation')}")
    return found or ["nothing"]


def _table(answers: list[Answer]) -> list[str]:
    offloads = any(answer.plan.offload for answer in answers)
    shared_out = any(answer.plan.experts > 1 for answer in answers)
    head = "seq recompute accumulate weights gradients optimizer activations logits"
    degrees = ["data", "sharding", "context", "tensor", "pipeline", *(["experts"] if shared_out else [])]
    rows = [[*degrees, *head.split(), "peak", *(["host"] if offloads else []), "sent", *TIMES, "seconds", "fits"]]
    for answer in answers:
        plan, memory = answer.plan, answer.memory
        stage = f"{plan.sharding} (stage{plan.stage})" if plan.stage else "1"
        sizes = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.peak]
        sizes += [memory.host] if offloads else []
        degrees = [str(plan.data), stage, *map(str, (plan.context, plan.tensor, plan.pipeline))]
        degrees += [str(plan.experts)] if shared_out else []
        rows.append(
            [*degrees, _yes(plan.sequence), _yes(plan.recompute), str(plan.accumulation), *map(_gib, sizes)]
            + [_gib(answer.volume.total)]
            + [f"{seconds:.3g}" for seconds in (*times_of(answer.time), answer.seconds)]
            + [_yes(answer.fits)]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def times_of(time: Time) -> tuple[float, ...]:
    """The seconds under :data:`TIMES`: the parts of a step, and what is sent behind computation."""
    return time.compute, sum(time.exposed.values()), time.idle, time.step, sum(time.hidden.values())


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _print_json(answers: list[Answer]) -> None:
    import json

    for answer in answers:
        record: dict[str, Any] = asdict(answer)
        record["volume"]["total"], record["seconds"] = answer.volume.total, answer.seconds
        click.echo(json.dumps(record))
