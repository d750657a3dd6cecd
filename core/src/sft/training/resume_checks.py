"""What keeps a run from going on from a checkpoint, or from measuring one: other plugins, data or weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft import runtime
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.models.adapter_folder import base_differences, check_base

if TYPE_CHECKING:
    from sft.context import CoreRun, Run
    from sft.data.batches import Schedule
    from sft.training.checkpoint_folder import Checkpoint


def check_resumable(run: CoreRun, schedule: Schedule, resumed: Checkpoint) -> None:
    """Refuse a checkpoint from which this run cannot go on exactly, and tell the user which settings have changed."""
    source, state = resumed
    data, seed = state["data"], state["seed"]
    if state["step"] > schedule.total_steps:
        raise UsageError(
            f"{source} is after step {state['step']} and this run ends at step {schedule.total_steps}; raise max_steps "
            "or num_train_epochs, or resume from an earlier checkpoint."
        )
    if not schedule.data.has_fingerprint(str(data["fingerprint"])):
        raise UsageError(
            f"{source} was trained on other tokens, so its place in the data means nothing here; resume with the same "
            "data, model and lengths, or start a new run from its weights."
        )
    if data["rows_per_step"] != schedule.rows_per_step or seed != schedule.seed:
        raise UsageError(
            f"{source} was trained with seed {seed} and {data['rows_per_step']} rows a step, this run has seed "
            f"{schedule.seed} and {schedule.rows_per_step}; resume with the same seed and batch sizes."
        )
    check_same_base(run, source)
    measured = run.dev_data.fingerprint() if run.dev_data is not None else None
    if None not in (measured, data.get("dev")) and measured != data["dev"]:
        run.say(f"note: {source.name} measured other dev data, so what was measured before it does not compare")
    free = {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "disable_tqdm",
        "dataset_num_proc",
        "encoded_cache",
    }
    now = run.settings.written()
    for name in sorted(set(now) | set(state["settings"])):
        if name not in free and now.get(name) != state["settings"].get(name):
            was = shown(repr(state["settings"].get(name)))
            run.say(f"note: {name} was {was} in {source.name} and is now {now.get(name)!r}")
    differences = runtime.differences(state.get("arithmetic", run.arithmetic), run.arithmetic)
    if differences and run.settings.training.deterministic:
        raise UsageError(
            f"deterministic: {source} was computed with another arithmetic, {differences}; resume with the same, or "
            "leave deterministic out: then last digits may differ."
        )
    if differences:
        run.say(
            f"note: {source.name} was computed with another arithmetic, {differences}; what follows may differ in its "
            "last digits from what that run would have computed"
        )


def check_agreed(run: CoreRun) -> None:
    """Refuse to go on where processes of the run have found different checkpoints to be whole: one of them may not be
    able to read what another one can."""
    first, last = -int(run.strategy.largest(-run.step)), int(run.strategy.largest(run.step))
    if first != last:
        raise UsageError(
            f"The processes of the run would go on from different checkpoints, of steps {first} and {last}; give all "
            "of them the same output_dir, or name a checkpoint with --resume_from_checkpoint."
        )


def check_same_base(run: CoreRun, source: Path) -> None:
    """Refuse a checkpoint whose adapter was trained over another base than this run's.

    Where the whole model trains, all its weights are in the checkpoint, and the base does not matter any more.
    """
    if not run.exports_adapter:
        return
    for clause in base_differences(source, run.source, run.plugins, run.settings.options):
        raise UsageError(
            f"{source} holds an adapter that was trained over {clause}; put the base back as it was, or start a new "
            "run."
        )


def check_continued(run: Run, adapter: Path) -> None:
    """Tell the user if ``adapter``, from which ``run`` goes on, was trained over another base than the run's: over
    other weights, or over a base that other plugins, or other options, had changed."""
    check_base(adapter, run.source, run.plugins, run.settings.options, run.say)


def check_same_plugins(run: CoreRun, resumed: Checkpoint) -> None:
    """Refuse a checkpoint that was trained with other shaping plugins, or with other options of theirs. Plugins that do
    not shape what is learned may come and go."""
    source, state = resumed
    before, now = state["shaping"], run.shaping()
    go_on = "resume" if run.settings.training.do_train else "measure it"
    otherwise = ", or start a new run" if run.settings.training.do_train else ""
    if set(before) != set(now):
        raise UsageError(
            f"{source} was trained with plugins {', '.join(sorted(before)) or 'none'}, and this run has "
            f"{', '.join(sorted(now)) or 'none'}; {go_on} with the same plugins{otherwise}."
        )
    for name, options in now.items():
        for key, value in options.items():
            if before[name].get(key) != value:
                raise UsageError(
                    f"{source} was trained with {key} {before[name].get(key)!r} of plugin {name}, and this run has "
                    f"{value!r}; {go_on} with the same value{otherwise}."
                )
