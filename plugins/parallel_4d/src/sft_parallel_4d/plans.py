"""Which plans there are: every way of dividing the devices that the model and the engine allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from sft import UsageError
from sft_parallel_4d.outline import Outline

_NAMED = ("data", "context", "tensor", "pipeline")


@dataclass(frozen=True)
class Plan:
    """``data`` × ``sharding`` × ``context`` × ``tensor`` × ``pipeline`` devices; ``stage`` is sharding's, 0 without; of
    :attr:`copies`, ``experts`` ranks share out those of a mixture."""

    data: int = 1
    sharding: int = 1
    stage: int = 0
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    recompute: bool = False
    accumulation: int = 1
    """Micro-batches of each data rank in a step."""
    offload: bool = False
    """Whether what sharding keeps in pieces rests in the host's memory."""
    virtual: int = 1
    """Parts of the model that each pipeline stage has."""
    context: int = 1
    """Ranks that share the tokens of each row."""
    experts: int = 1

    @property
    def data_world(self) -> int:
        """Ranks that read different records."""
        return self.data * self.sharding

    @property
    def devices(self) -> int:
        return self.data_world * self.context * self.tensor * self.pipeline

    @property
    def pieces(self) -> int:
        """Ranks that share pieces: those that share rows do, too."""
        return self.sharding * self.context if self.stage else 1

    @property
    def copies(self) -> int:
        """Ranks that have the same parameters, or the same pieces of them."""
        return self.data_world * self.context // self.pieces

    @property
    def stream_parts(self) -> int:
        """Tensor ranks that have a part each of the residual stream."""
        return self.tensor if self.sequence else 1

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name)}" for name in _NAMED if getattr(self, name) > 1]
        if self.stage:
            parts.append(f"stage{self.stage} on {self.sharding}{' with offload' if self.offload else ''}")
        parts += [f"experts on {self.experts}"] if self.experts > 1 else []
        parts += [f"{self.virtual} parts a stage"] if self.virtual > 1 else []
        parts += [name for name in ("sequence", "recompute") if getattr(self, name)]
        return f"{' x '.join(parts) or 'one process'}, {self.accumulation} micro-batches a step"


@dataclass(frozen=True)
class Wanted:
    """What a user has decided; None leaves it to the plans."""

    tensor: int | None = None
    pipeline: int | None = None
    sharding: int | None = None
    context: int | None = None
    most_context: int | None = None
    """The most ranks that share a row, where ``context`` is open."""
    stage: int | None = None
    sequence: bool | None = None
    recompute: bool | None = None
    offload: bool = False
    """Whether sharding's pieces rest in the host's memory; a plan has that only if it is asked for."""
    virtual: int = 1
    """Parts of the model a pipeline stage; a plan has more than one only if that is asked for."""
    experts: int | None = None


def settings_of(plan: Plan) -> dict[str, Any]:
    """The settings of a run that ask for ``plan``, by name."""
    stage = f"stage{plan.stage}{' offload' if plan.offload else ''}"
    return {
        "tensor_parallel_degree": plan.tensor,
        "pipeline_parallel_degree": plan.pipeline,
        "virtual_pp_degree": plan.virtual,
        "context_parallel_degree": plan.context,
        "expert_parallel_degree": plan.experts,
        "sharding": stage if plan.stage else None,
        "sharding_parallel_degree": plan.sharding if plan.stage else -1,
        "sequence_parallel": plan.sequence,
        "recompute": plan.recompute,
        "gradient_accumulation_steps": plan.accumulation,
    }


def legal_plans(outline: Outline, devices: int, rows: int, batch: int, wanted: Wanted | None = None) -> list[Plan]:
    """Every legal plan for ``devices`` whose step has ``rows`` rows, in micro-batches of ``batch`` rows.

    Raises :class:`UsageError` that says why, if there is none.
    """
    wanted = wanted or Wanted()
    no_stage3 = _stage3_refusal(outline)
    if outline.steps_wholes and wanted.stage:
        raise UsageError("The optimizer steps whole parameters, which sharding would divide; leave one of them out.")
    if no_stage3 is not None and wanted.stage == 3:
        raise UsageError(f"{no_stage3}; leave its plugin out, or sharding stage3.")
    no_experts = cache(lambda degree: expert_refusal(outline, degree))  # thousands of plans have a few degrees
    if wanted.experts is not None and no_experts(wanted.experts) is not None:
        raise UsageError(f"{no_experts(wanted.experts)}; give another degree, or leave it out.")
    found, refused = list[Plan](), dict.fromkeys(_divisions(devices, wanted))
    why_not = refusals(outline, wanted.virtual)
    in_rows, excluded = dict[str, None](), dict[str, None]()
    if not refused:
        raise UsageError(
            f"The degrees that are fixed do not divide {devices} devices; give degrees whose product divides them."
        )
    for tensor, pipeline, sharding, context in refused:
        reason = why_not(tensor, pipeline, context)
        data = devices // (tensor * pipeline * sharding * context)
        if reason is None and rows % (batch * data * sharding):
            reason = f"{rows} rows a step are not whole micro-batches of {batch} rows on {data * sharding} data ranks"
            in_rows[reason] = None
        refused[tensor, pipeline, sharding, context] = reason
        if reason is None:
            accumulation = rows // (batch * data * sharding)
            before = len(found)
            found += [
                Plan(
                    *(data, sharding, stage, tensor, pipeline, sequence, recompute, accumulation),
                    *(wanted.offload, wanted.virtual),
                    context=context,
                    experts=experts,
                )
                for stage in _stages(sharding, context, tensor, pipeline, wanted)
                if stage < 3 or no_stage3 is None
                if not (stage and outline.steps_wholes)
                for sequence in _either(wanted.sequence)
                if tensor > 1 or not sequence
                for recompute in (_either(wanted.recompute))
                for experts in _divisors(data if stage else data * context)
                if wanted.experts in (None, experts) and no_experts(experts) is None
            ]
            if len(found) == before:
                excluded[_exclusion(tensor, pipeline, sharding, context, data, wanted)] = None
    if not found:
        cure = "Fix fewer degrees, or other ones."
        if in_rows:
            cure = "Give another rows_per_step, a smaller per_device_train_batch_size, or fewer or other fixed degrees."
        reasons = [*in_rows, *excluded] or list(dict.fromkeys(reason for reason in refused.values() if reason))
        raise UsageError(f"No plan is possible on {devices} devices: {'; '.join(reasons[:3])}. {cure}")
    return found


def _exclusion(tensor: int, pipeline: int, sharding: int, context: int, data: int, wanted: Wanted) -> str:
    """What of ``wanted`` does not go with degrees by which the model can be divided."""
    if wanted.sequence and tensor == 1:
        return "sequence_parallel needs tensor parallelism"
    if wanted.stage and wanted.stage not in stages_beside(pipeline):
        return stage_refusal(wanted.stage)
    copies = data if sharding > 1 or wanted.stage else data * context
    if wanted.experts and copies % wanted.experts:
        return f"expert_parallel_degree {wanted.experts} does not divide the ranks that hold the same pieces ({copies})"
    if wanted.stage and sharding * context == 1:
        return f"sharding stage{wanted.stage} has no ranks that could share pieces"
    return "the settings that are fixed exclude each other"


def stage_refusal(stage: int) -> str:
    """Why sharding's ``stage`` is refused where :func:`stages_beside` lacks it."""
    return f"sharding stage{stage} does not go with pipeline parallelism; stage1 does"


def refusal(outline: Outline, tensor: int, pipeline: int, virtual: int = 1, context: int = 1) -> str | None:
    """Why the model cannot be divided so, with ``virtual`` parts a pipeline stage; None if it can."""
    return refusals(outline, virtual)(tensor, pipeline, context)


def refusals(outline: Outline, virtual: int = 1) -> Callable[[int, int, int], str | None]:
    """:func:`refusal` of many tensor, pipeline and context degrees; what all have in common is looked at once."""
    parts = {"attention heads": outline.heads, "the intermediate size": outline.inner}
    for experts in {block.experts for block in outline.architecture.blocks if block.experts is not None}:
        parts["the intermediate size of experts"] = experts.inner
        if experts.shared_inner is not None:
            parts["the intermediate size of shared experts"] = experts.shared_inner
    return partial(_refusal, outline, virtual, outline.undivided(), parts)


def _refusal(
    outline: Outline,
    virtual: int,
    unsaid: str | None,
    parts: Mapping[str, int],
    tensor: int,
    pipeline: int,
    context: int,
) -> str | None:
    if outline.steps_wholes and tensor > 1:
        return "the optimizer steps whole parameters, which tensor parallelism would divide"
    if unsaid is not None and tensor * pipeline > 1:
        return _unsaid(unsaid)
    if pipeline > 1 and "pipeline" in outline.excluded:
        return f"{outline.excluded['pipeline']}, so a run refuses pipeline parallelism"
    for name, size in parts.items():
        if size % tensor:
            return f"tensor parallel degree {tensor} does not divide {name} ({size})"
    if tensor > outline.vocabulary:
        return f"tensor parallel degree {tensor} is more than the vocabulary has tokens ({outline.vocabulary})"
    keys = f"key/value heads ({outline.kv_heads})"
    if outline.kv_heads % tensor and tensor % outline.kv_heads:
        return f"tensor parallel degree {tensor} neither divides {keys} nor is a multiple of them"
    if outline.kv_heads < tensor and (outline.architecture.fused_attention or outline.architecture.head_norm == "all"):
        shared = "lie in one matrix with queries" if outline.architecture.fused_attention else "are normed together"
        return f"tensor parallel degree {tensor} is more than {keys}, which {shared} and so cannot be had by several"
    if outline.heads // tensor % context:
        own = f"{outline.heads // tensor} on each tensor rank" if tensor > 1 else str(outline.heads)
        return f"context parallel degree {context} does not divide attention heads ({own})"
    if virtual > 1 and pipeline == 1:
        return f"{virtual} parts a pipeline stage (virtual_pp_degree) need more than one stage"
    if pipeline * virtual > len(outline.blocks):
        each = f" of {virtual} parts each" if virtual > 1 else ""
        return f"{pipeline} pipeline stages{each} are more than {len(outline.blocks)} layers"
    return None


def expert_refusal(outline: Outline, degree: int) -> str | None:
    """Why the experts cannot be shared out so; None if they can."""
    if degree == 1:
        return None
    counts = {block.experts.count for block in outline.architecture.blocks if block.experts is not None}
    if not counts:
        return f"expert_parallel_degree {degree} has nothing to share out, as this model has no experts"
    unsaid = outline.undivided()
    if unsaid is not None:
        return _unsaid(unsaid)
    odd = next((count for count in sorted(counts) if count % degree), None)
    return None if odd is None else f"expert_parallel_degree {degree} does not divide the experts of a block ({odd})"


def _stage3_refusal(outline: Outline) -> str | None:
    """Why parameters cannot be kept in pieces alone (stage 3); None if they can."""
    unsaid = outline.undivided()
    if unsaid is not None:
        return _unsaid(unsaid)
    why = outline.excluded.get("stage3")
    return None if why is None else f"{why}, so a run refuses sharding stage3"


def _unsaid(tensor: str) -> str:
    return f"{tensor} does not say how it is divided among processes (its layer lacks sides)"


def possible(outline: Outline, devices: int, virtual: int = 1) -> list[tuple[int, int, int]]:
    """The tensor, pipeline and context degrees that the model can be divided by, and ``devices`` too; see
    :func:`refusal`."""
    degrees = (
        (tensor, pipeline, context)
        for tensor in _divisors(devices)
        for pipeline in _divisors(devices // tensor)
        for context in _divisors(devices // tensor // pipeline)
    )
    why_not = refusals(outline, virtual)
    return [
        (tensor, pipeline, context)
        for tensor, pipeline, context in degrees
        if why_not(tensor, pipeline, context) is None
    ]


def _divisions(devices: int, wanted: Wanted) -> Iterator[tuple[int, int, int, int]]:
    for tensor in _divisors(devices, wanted.tensor):
        for pipeline in _divisors(devices // tensor, wanted.pipeline):
            for sharding in _divisors(devices // tensor // pipeline, wanted.sharding):
                for context in _divisors(devices // tensor // pipeline // sharding, wanted.context):
                    if wanted.context or not wanted.most_context or context <= wanted.most_context:
                        yield tensor, pipeline, sharding, context


def stages_beside(pipeline: int) -> tuple[int, ...]:
    """Sharding's stages that go with a pipeline of that degree."""
    return (1,) if pipeline > 1 else (1, 2, 3)


def _stages(sharding: int, context: int, tensor: int, pipeline: int, wanted: Wanted) -> list[int]:
    none = [0] if sharding == 1 and not wanted.offload and wanted.stage is None else []
    if sharding * context == 1 and not wanted.offload:
        return none
    return none + [stage for stage in stages_beside(pipeline) if wanted.stage in (None, stage)]


def _either(wanted: bool | None) -> list[bool]:
    return [False, True] if wanted is None else [wanted]


def _divisors(number: int, only: int | None = None) -> list[int]:
    """Those of ``number``, or of them ``only`` one."""
    if only is not None:
        return [] if number % only else [only]
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
