"""Refuses an impossible plan before anything heavy happens, with those that would work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft import UsageError
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.paper import model_outline
from sft_parallel_4d.plans import Plan, expert_refusal, possible, refusal, stage_refusal, stages_beside

if TYPE_CHECKING:
    from sft import DryRun, Run, Settings
    from sft_parallel_4d.options import ParallelOptions


def check_settings(run: Run | DryRun, options: ParallelOptions, world: int) -> None:
    """Refuse what the settings alone say of ``world`` processes; nothing of the model is looked at."""
    stage, _ = stage_and_offload(options.sharding)
    check_numbers(options)
    tensor, pipeline, context = degrees(options)
    needed, experts = tensor * pipeline * context, experts_of(options)
    if world == 1 and experts > 1 == needed:
        raise UsageError(
            f"expert parallel degree {experts} needs {experts} processes or a multiple of it, and there is 1: add "
            f"--nproc {experts}, or start sft with python -m paddle.distributed.launch."
        )
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
    if world % needed == 0:
        copies = left // _sharding(options, stage, left) * (1 if stage else context)
        _check_experts(options, left, copies)
    if options.sequence_parallel and tensor == 1:
        raise UsageError("sequence_parallel needs tensor parallelism; set tensor_parallel_degree, or leave it out.")
    if options.virtual_pp_degree > 1 and pipeline == 1:
        raise UsageError("virtual_pp_degree needs pipeline parallelism; set pipeline_parallel_degree, or leave it out.")
    _check_run(run, pipeline, context, world)
    if run.settings.data.eval_with_do_generation and left > 1:
        _check_answers(stage, experts)


def check_numbers(options: ParallelOptions) -> None:
    """Refuse what is no degree, and no size of a bucket."""
    for name in ("tensor", "pipeline", "context", "expert"):
        name += "_parallel_degree"
        if getattr(options, name) == 0:
            raise UsageError(f"{name}: expected a number of processes, or -1 for one, got 0.")
    if options.sharding_comm_buffer_size_MB == 0:
        raise UsageError("sharding_comm_buffer_size_MB: expected a number of MiB, or -1 for 128, got 0.")


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
    why = expert_refusal(outline, experts_of(options))
    if why is not None:
        raise UsageError(f"{why}; give another degree, or leave it out.")
    if stage and stage not in stages_beside(pipeline):
        raise refuse(stage_refusal(stage))
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
        experts=experts_of(options),
        context=context,
    )


def _check_experts(options: ParallelOptions, left: int, copies: int) -> None:
    """Refuse a number of ranks that share out experts that does not divide the ``copies``: the data ranks beside
    sharding, and without it those that share their rows."""
    experts = experts_of(options)
    if copies % experts:
        beside = f", which are {copies} of the {left} data ranks" if copies < left else f" ({copies})"
        possible_degrees = ", ".join(str(degree) for degree in range(1, copies + 1) if copies % degree == 0)
        less = f" With sharding_parallel_degree {left // experts} it would." if left % experts == 0 else ""
        raise UsageError(
            f"expert_parallel_degree {experts} does not divide the ranks that hold the same pieces{beside}; give one "
            f"of {possible_degrees}, or leave it out.{less}"
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


def experts_of(options: ParallelOptions) -> int:
    """Ranks that share out experts."""
    return max(1, options.expert_parallel_degree)


def _sharding(options: ParallelOptions, stage: int, left: int) -> int:
    """How many of the ``left`` data processes share pieces: all, or all that have the same experts."""
    if not stage:
        return 1
    given, experts = options.sharding_parallel_degree, experts_of(options)
    return given if given >= 1 else left if left % experts else left // experts


def why_no_pieces(plan: Plan, options: ParallelOptions) -> str:
    """Why nobody shares pieces under ``plan``, although sharding is asked for."""
    if plan.data == 1:
        return "there is one data rank"
    if options.sharding_parallel_degree == 1:
        return "sharding_parallel_degree is 1"
    return "all data ranks share out experts"


def _check_run(run: Run | DryRun, pipeline: int, context: int, world: int) -> None:
    """What a run may ask for that needs whole rows, or all layers, in one process; and its device."""
    objective = run.plugins.provider("sft_objective")
    if context > 1 and objective is not None:
        raise UsageError(
            f"Plugin {objective} minimises something for which each process needs whole records, and "
            "context_parallel_degree divides their tokens; leave it out (tensor parallelism with sequence_parallel "
            "needs less memory for long rows, too)."
        )
    if pipeline > 1 and objective is not None:
        raise UsageError(
            f"Plugin {objective} minimises something for which each process needs all layers, and a pipeline's stages "
            "have some each; leave pipeline parallelism out."
        )
    device = run.settings.training.device
    if world > 1 and device is not None and ":" in device:
        raise UsageError(f"device {device} is one device, and {world} processes have one each; give gpu or cpu.")


def _check_answers(stage: int, experts: int) -> None:
    """Refuse answers at evaluation, of which each of several data ranks writes its own, where ranks need each other for
    every token."""
    if experts > 1:
        which, needed = "expert_parallel_degree", "the experts"
    elif stage == 3:
        which, needed = "sharding stage3", "the pieces of weights"
    else:
        return
    raise UsageError(
        f"eval_with_do_generation does not go with {which} where several data ranks write answers: each token needs "
        f"{needed} of all ranks, and answers of different lengths would leave some of these waiting; leave it out, and "
        "use sft generate or sft evaluate after training."
    )


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
    found = possible(outline, world, virtual)
    if virtual > 1 and not found:
        return f"without virtual_pp_degree {_instead(outline, world, stage, 1, shares_rows)}"
    plans = [
        f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
        for tensor, pipeline, context in found
        if not stage or stage in stages_beside(pipeline)
        if shares_rows or context == 1
    ]
    more = f" and {len(plans) - 6} more" if len(plans) > 6 else ""
    these = ", ".join(plans[:6]) + more
    return f"on {world} processes these degrees work{beside}: {these}; data parallelism takes the rest."
