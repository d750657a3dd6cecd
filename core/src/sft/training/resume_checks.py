"""What keeps a run from going on from a checkpoint, or from measuring one: other plugins, data or weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sft import arithmetic
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.models.adapter_folder import base_differences, check_base
from sft.models.rows_in_files import check_same_rows
from sft.options import options_of

if TYPE_CHECKING:
    from sft.context import CoreRun, Run
    from sft.data.batches import Schedule
    from sft.training.checkpoint_folder import Checkpoint


_FREE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "quiet",
    "log_level",
    "json_logs",
    "dataset_num_proc",
    "encoded_cache",
    "on_bad_record_limit",
    "report_to",
    "run_name",
}
"""Settings that change nothing of what is computed."""


def check_beginning(run: CoreRun, schedule: Schedule, resumed: Checkpoint | None) -> None:
    """:func:`check_resumable`; of a run that begins anew, :func:`check_replaced`."""
    if resumed is not None:
        check_resumable(run, schedule, resumed)
    else:
        check_replaced(run)


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
    changed = changed_settings(run, state["settings"])
    for name, (was, now) in changed.items():
        run.say(f"note: {name} was {shown(repr(was))} in {source.name} and is now {now!r}")
    check_arithmetic(run, source.name, state)
    run.earlier = earlier_of(run, state, bool(changed))


def changed_settings(run: CoreRun, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of which what is computed may depend, and which are not what they were: by name what they were and
    what they are. One that is newer than what is written, and has its default, is none of them."""
    now = run.settings.written()
    known = [name for name in sorted({*now, *before} - _FREE) if name in before or name in run.settings.given]
    return {name: (before.get(name), now.get(name)) for name in known if now.get(name) != before.get(name)}


def earlier_of(run: CoreRun, state: Mapping[str, Any], changed: bool) -> list[dict[str, Any]]:
    """:attr:`CoreRun.earlier` of a run that goes on from the checkpoint of ``state``, with ``changed`` settings."""
    then = state.get("arithmetic", run.arithmetic)
    if not changed and not arithmetic.differences(then, run.arithmetic):
        return list(state.get("earlier", []))
    leg = {"until": state["step"], "settings": state["settings"], "arithmetic": then}
    return [*state.get("earlier", []), leg]


def check_arithmetic(run: CoreRun, name: str, before: Mapping[str, Any]) -> None:
    """Say, and let run.json say, that ``name`` was computed with another arithmetic than this run computes with, if it
    was; ``before`` is what it says of itself. With ``deterministic strict`` that is refused."""
    run.other_arithmetic = list(before.get("other_arithmetic", []))
    if "arithmetic" not in before and run.settings.training.deterministic == "strict":
        raise UsageError(
            f"deterministic strict: {name} does not say with which arithmetic it was computed, as an earlier version "
            "of sft wrote it; leave strict out: then last digits may differ."
        )
    differences = arithmetic.differences(before.get("arithmetic", run.arithmetic), run.arithmetic)
    if differences and run.settings.training.deterministic == "strict":
        raise UsageError(
            f"deterministic strict: {name} was computed with another arithmetic, {differences}; compute with the same, "
            "or leave strict out: then last digits may differ."
        )
    if differences:
        run.other_arithmetic.append({"step": run.step, "from": name, "differences": differences})
        run.say(
            f"note: {name} was computed with another arithmetic, {differences}; what follows may differ in its "
            "last digits from what that run would have computed"
        )


def check_replaced(run: CoreRun) -> None:
    """:func:`check_arithmetic` of the run that this one replaces, where it has the same settings."""
    before, now = run.earlier_report, run.settings.written()
    there, computed = before.get("settings"), before.get("arithmetic")
    if not isinstance(there, dict) or not isinstance(computed, dict):
        return
    if all(there.get(name) == now[name] for name in now if name not in (*_FREE, "deterministic")):
        check_arithmetic(run, f"the run that {run.output_dir} holds", {"arithmetic": computed})


def check_alike(run: CoreRun) -> None:
    """Say, and let run.json say, that the processes of the run have different arithmetics, as those of unlike machines
    have. With ``deterministic strict`` that is refused."""
    digest = arithmetic.digest(run.arithmetic)
    if run.strategy.largest(digest) == -run.strategy.largest(-digest):
        return
    run.arithmetic["processes_differ"] = True
    text = "the processes of this run have different processors, threads or libraries"
    if run.settings.training.deterministic == "strict":
        raise UsageError(f"deterministic strict: {text}; start them all alike, or leave strict out.")
    run.say(f"note: {text}, so what they compute may differ in its last digits")


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
    """Refuse a checkpoint whose adapter was trained over another base than this run's, or has rows of other tokens.

    Where the whole model trains, all its weights are in the checkpoint, and the base does not matter any more.
    """
    if not run.exports_adapter:
        return
    for clause in base_differences(source, run.source, run.plugins, run.settings.options):
        raise UsageError(
            f"{source} holds an adapter that was trained over {clause}; put the base back as it was, or start a new "
            "run."
        )
    check_same_rows(source, run.rows)


def check_continued(run: Run, adapter: Path) -> None:
    """Tell the user if ``adapter``, from which ``run`` goes on, was trained over another base than the run's: over
    other weights, or over a base that other plugins, or other options, had changed. What that adapter has of layers
    that were trained whole (``modules_to_save``) goes on too."""
    cast("CoreRun", run).continued = adapter
    check_base(adapter, run.source, run.plugins, run.settings.options, run.say)


def check_same_plugins(run: CoreRun, resumed: Checkpoint) -> None:
    """Refuse a checkpoint that was trained with other shaping plugins, or with other options of theirs. Plugins that do
    not shape what is learned may come and go."""
    source, state = resumed
    before, now = state["shaping"], run.shaping()
    go_on = "resume" if run.settings.training.do_train else "measure it"
    otherwise = ", or start a new run" if run.settings.training.do_train else ""
    files = state.get("plugin_files", {})
    if set(before) != set(now):
        lacking = [f"{name}: --plugin {shown(files[name]['path'])}" for name in sorted({*before} - {*now} & {*files})]
        where = f" ({', '.join(lacking)})" if lacking else ""
        raise UsageError(
            f"{source} was trained with plugins {', '.join(sorted(before)) or 'none'}, and this run has "
            f"{', '.join(sorted(now)) or 'none'}; {go_on} with the same plugins{where}{otherwise}."
        )
    for name, file in run.plugins.files.items():
        if name in files and files[name]["sha256"] != file.sha256:
            run.say(f"note: {file.path}, from which plugin {name} is, has changed since {source.name} was written")
    for name, options in now.items():
        declared = options_of(type(run.settings.options[name])) if options else {}
        for key, value in options.items():
            then = before[name].get(key, declared[key].default)  # what was learned before there was such a setting
            if then != value:
                raise UsageError(
                    f"{source} was trained with {key} {then!r} of plugin {name}, and this run has "
                    f"{value!r}; {go_on} with the same value{otherwise}."
                )
