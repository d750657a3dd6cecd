"""What the settings of a run say about its plans: what is decided, and how their memory is reckoned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sft import UsageError
from sft_parallel_4d.checks import check_numbers, check_settings, stage_and_offload
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.paper import NAME, PaperRun
from sft_parallel_4d.plans import Plan, Wanted, legal_plans, settings_of

if TYPE_CHECKING:
    from sft import Settings

SHARE = 1024
"""Tokens of a row that a plan leaves each rank that shares it, unless others are asked for."""


def calculator_of(paper: PaperRun, batch: int, length: int, device_memory: int | None) -> Calculator:
    """Of micro-batches of ``batch`` rows of ``length`` tokens; ``device_memory`` of a GPU in bytes, None of a CPU."""
    settings = paper.run.settings
    bucket = settings.options[NAME].bucket
    return Calculator(paper.outline, precision_of(settings), batch, length, device_memory=device_memory, bucket=bucket)


def precision_of(settings: Settings) -> Precision:
    """As a run on a GPU has it: with 16 bits, frozen matrices have 16 unless O1 is typed, and with O2 all weights."""
    training = settings.training
    if not (training.bf16 or training.fp16):
        return Precision()
    level = training.fp16_opt_level if "fp16_opt_level" in settings.given else None
    return Precision(16 if level == "O2" else 32, 16, 32 if level == "O1" else 16)


def accepted_plans(paper: PaperRun, devices: int, rows: int, batch: int, wanted: Wanted) -> list[Plan]:
    """Of :func:`legal_plans` those that a run would take, as far as its settings tell. Raises :class:`UsageError` that
    says why, if there is none."""
    reasons, found = list[UsageError](), list[Plan]()
    for plan in legal_plans(paper.outline, devices, rows, batch, wanted):
        options = paper.run.settings.options[NAME]
        own = {name: value for name, value in settings_of(plan).items() if hasattr(options, name)}
        try:
            check_settings(paper.run, replace(options, **own), devices)
        except UsageError as error:
            reasons.append(error)
        else:
            found.append(plan)
    if not found:
        raise reasons[0]
    return found


def wanted(settings: Settings) -> Wanted:
    """What the settings of a run decide about its plan."""
    options, given = settings.options[NAME], settings.given
    stage, offload = stage_and_offload(options.sharding)
    check_numbers(options)

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
        experts=degree("expert_parallel_degree"),
    )
