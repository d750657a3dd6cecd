"""Refuses an impossible plan before anything heavy happens, with those that would work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft import UsageError
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import model_outline
from sft_parallel_4d.plans import Plan, possible, refusal, stages_beside

if TYPE_CHECKING:
    from sft import DryRun, Run, Settings
    from sft_parallel_4d.options import ParallelOptions


def check_settings(run: Run | DryRun, options: ParallelOptions, world: int) -> None:
    """Refuse what the settings alone say of ``world`` processes; nothing of the model is looked at."""
    stage, _ = stage_and_offload(options.sharding)
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"):
        if getattr(options, name) == 0:
            raise UsageError(f"{name}: expected a number of processes, or -1 for one, got 0.")
    tensor, pipeline, context = degrees(options)
    needed = tensor * pipeline * context
    if world == 1 and needed > 1:
        raise UsageError(
            f"{_given(options)} needs {needed} processes or a multiple of it, and there is 1: add --nproc {needed}, or "
            "start sft with python -m paddle.distributed.launch."
        )
    if not stage and options.sharding_parallel_degree > 1:
        raise UsageError("sharding_parallel_degree is set and sharding is not; set it to stage1, stage2 or stage3.")
    left = world // needed
    if world % needed == 0 and left % _sharding(options, stage, left):
        possible_degrees = ", ".join(str(degree) for degree in range(1, left + 1) if left % degree == 0)
        raise UsageError(
            f"sharding_parallel_degree {options.sharding_parallel_degree} does not divide the data processes ({left}); "
            f"give one of {possible_degrees}, or leave it out: all of them."
        )
    if options.sequence_parallel and tensor == 1:
        raise UsageError("sequence_parallel needs tensor parallelism; set tensor_parallel_degree, or leave it out.")
    if options.virtual_pp_degree > 1 and pipeline == 1:
        raise UsageError("virtual_pp_degree needs pipeline parallelism; set pipeline_parallel_degree, or leave it out.")
    _check_run(run, stage, context, world)


def plan_for(run: Run, options: ParallelOptions, world: int) -> Plan:
    """The plan for ``world`` processes that checked settings ask for; reads or fetches the model's ``config.json``."""
    stage, _ = stage_and_offload(options.sharding)
    tensor, pipeline, context = degrees(options)
    outline = model_outline(run)

    def refuse(why: str) -> UsageError:
        return UsageError(f"{why}; {_instead(outline, world, stage, options.virtual_pp_degree, context > 1)}")

    if world % (tensor * pipeline * context):
        raise refuse(f"{_given(options)} does not divide {world} processes")
    why = refusal(outline, tensor, pipeline, options.virtual_pp_degree, context)
    if why is not None:
        raise refuse(why)
    if stage and stage not in stages_beside(pipeline):
        raise refuse(f"sharding stage{stage} does not go with pipeline parallelism; stage1 does")
    plan = plan_of(run.settings, options, world)
    if tensor > 1 or plan.stage:
        _check_optimizer(run, outline)
    return plan


def plan_of(settings: Settings, options: ParallelOptions, world: int) -> Plan:
    """The plan for ``world`` processes that settings ask for which are known to be possible."""
    stage, offload = stage_and_offload(options.sharding)
    tensor, pipeline, context = degrees(options)
    left = world // (tensor * pipeline * context)
    sharding = _sharding(options, stage, left)
    return Plan(
        left // sharding,
        sharding,
        stage if sharding * context > 1 or offload else 0,
        tensor,
        pipeline,
        options.sequence_parallel,
        settings.training.recompute,
        settings.training.gradient_accumulation_steps,
        offload,
        options.virtual_pp_degree,
        context=context,
    )


def _check_optimizer(run: Run, outline: Outline) -> None:
    """Refuse an optimizer that says on paper that it steps whole parameters, before weights are read."""
    name = run.plugins.provider("sft_optimizer")
    if name is None:
        return
    run.plugins.ask(name, "parallel_outline", outline=outline, hook=run.hook)
    if outline.steps_wholes:
        raise UsageError(
            f"The optimizer of plugin {name} steps a parameter as a whole, and sharding and tensor parallelism divide "
            "parameters; leave these out (data and pipeline parallelism divide none), or take another optim."
        )


def degrees(options: ParallelOptions) -> tuple[int, int, int]:
    """Processes that share each layer, stages of layers, and processes that share each row."""
    found = (options.tensor_parallel_degree, options.pipeline_parallel_degree, options.context_parallel_degree)
    tensor, pipeline, context = (max(1, degree) for degree in found)
    return tensor, pipeline, context


def _given(options: ParallelOptions) -> str:
    """The degrees that are asked for, in words."""
    tensor, pipeline, context = degrees(options)
    more = f" x context parallel degree {context}" if context > 1 else ""
    return f"tensor parallel degree {tensor} x pipeline parallel degree {pipeline}{more}"


def _sharding(options: ParallelOptions, stage: int, left: int) -> int:
    """How many of the ``left`` data processes share pieces."""
    return 1 if not stage else left if options.sharding_parallel_degree < 1 else options.sharding_parallel_degree


def _check_run(run: Run | DryRun, stage: int, context: int, world: int) -> None:
    """What a run may ask for that needs whole rows in one process, or the same number of answers in each."""
    objective = run.plugins.provider("sft_objective")
    if context > 1 and objective is not None:
        raise UsageError(
            f"Plugin {objective} minimises something for which each process needs whole records, and "
            "context_parallel_degree divides their tokens; leave it out (tensor parallelism with sequence_parallel "
            "needs less memory for long rows, too)."
        )
    if stage == 3 and run.settings.data.eval_with_do_generation:
        raise UsageError("eval_with_do_generation does not go with sharding stage3; leave it out, or use stage2.")
    device = run.settings.training.device
    if world > 1 and device is not None and ":" in device:
        raise UsageError(f"device {device} is one device, and {world} processes have one each; give gpu or cpu.")


def stage_and_offload(text: str | None) -> tuple[int, bool]:
    """What setting ``sharding`` says: the stage (0: none), and whether pieces rest in the host's memory."""
    words = (text or "").replace(",", " ").lower().split()
    stages = [word for word in words if word in ("stage1", "stage2", "stage3")]
    unknown = [word for word in words if word not in ("stage1", "stage2", "stage3", "offload")]
    if unknown or len(stages) > 1 or (words and not stages):
        raise UsageError(f"sharding: expected stage1, stage2 or stage3, and offload beside it if wanted, got {text!r}.")
    return (int(stages[0][-1]) if stages else 0), "offload" in words


def _instead(outline: Outline, world: int, stage: int, virtual: int, shares_rows: bool) -> str:
    """The degrees that would be accepted, beside the sharding that is asked for, where rows are shared or are not."""
    beside = f" beside stage{stage}" if stage > 1 else ""
    plans = [
        f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
        for tensor, pipeline, context in possible(outline, world, virtual)
        if not stage or stage in stages_beside(pipeline)
        if shares_rows or context == 1
    ]
    more = f" and {len(plans) - 6} more" if len(plans) > 6 else ""
    these = ", ".join(plans[:6]) + more
    return f"on {world} processes these degrees work{beside}: {these}; data parallelism takes the rest."
