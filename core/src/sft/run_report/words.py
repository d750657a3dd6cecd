"""A run in words: what its page says of it. Texts of data are in none of them but places and reasons, which are made
harmless where they are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sft.data.encoded import Counts
from sft.durations import duration
from sft.facts import Fact
from sft.run_report.value import Curve, RunReport

_PLACES = ("output_dir", "run_name", "overwrite_output_dir", "resume_from_checkpoint", "logging_dir")
"""Settings that say where a run is, and nothing about it."""


def sentence(run: RunReport) -> str:
    """How far the run has come, in a clause."""
    of = f" of {run.total_steps:,}" if run.total_steps and run.total_steps != run.step else ""
    at = run.moments
    epochs = f" ({at.epochs[-1]:.2f} epochs)" if at.epochs and at.steps[-1] == run.step else ""
    gone = "; its process is gone, and said nothing" if run.status == "died" else ""
    return f"after step {run.step:,}{of}{epochs}, in {duration(run.seconds)}{gone}"


def figures(run: RunReport) -> list[tuple[str, str, str]]:
    """What one looks at first: what it is, its value, and what it was before."""
    found = []
    for curve, label in ((run.latest_loss, "train loss"), (run.curve("loss", "dev"), "dev loss")):
        if curve is not None:
            found.append((label, *_last(curve, "{:.4f}")))
    accuracy = run.curve("accuracy", "dev")
    if accuracy is not None:
        found.append(("dev accuracy", *_last(accuracy, "{:.1%}")))
    speed = [curve for curve in run.curves if curve.chart == "tokens_per_second"]
    if run.moments.seconds and run.moments.seconds[-1] and speed:
        found.append(
            ("tokens a second", f"{run.moments.tokens[-1] / run.moments.seconds[-1]:,.0f}", "mean of training")
        )
    memory = run.curve("memory_mib", "train")
    if memory is not None:
        found.append(("peak memory", f"{memory.values[-1]:,.0f} MiB", ""))
    if run.trained and run.total:
        found.append(
            ("trained", f"{100 * run.trained / run.total:.2f} %", f"{run.trained:,} of {run.total:,} parameters")
        )
    return found


def events(run: RunReport) -> list[Fact]:
    """What was skipped, cut, refused or left out, and what ended the run early."""
    found: list[Fact] = []
    for split, counts in run.counts.items():
        found.append((f"{split} data", [*_counted(counts), *_of_sets(counts)]))
    if run.skipped_steps:
        found.append(("steps", [f"{run.skipped_steps:,} changed nothing: they overflowed, or were not finite"]))
    early = run.result.get("stopped_early")
    if isinstance(early, dict):
        found.append(("ended early", [f"after step {early.get('step')}: {early.get('reason')}"]))
    if run.notes:
        found.append(("notes", run.notes))
    if run.without_effect:
        found.append(("settings without effect", [f"{name}: {why}" for name, why in run.without_effect]))
    return found


def of_skipped(one: Mapping[str, Any]) -> str:
    """A record that cannot be read, in a line."""
    where = ", ".join(f"{unit} {one[unit]}" for unit in ("line", "row", "record") if unit in one)
    return f"{one.get('split')}: {one.get('file')}, {where}: {one.get('reason')}"


def machine(run: RunReport) -> list[Fact]:
    """What it ran on, and with."""
    said = [(name.replace("_", " "), [value(one).removeprefix(f"{name}: ")]) for name, one in run.machine.items()]
    precision = [f"{name} {one}" for name, one in run.precision.items()]
    commits = [f"{what}: {one}" for what, one in run.hub.items()]
    return [*said, *([("precision", precision)] if precision else []), *([("hub commits", commits)] if commits else [])]


def apart(runs: Sequence[RunReport]) -> list[RunReport]:
    """The runs, under names that are not the same: where two are, each is called by its folder."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else dataclasses.replace(run, name=run.folder) for run in runs]


def differences(runs: Sequence[RunReport]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of each; where a run has no such setting, None.
    What only says where a run is does not count."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    found = {name: [run.settings.get(name) for run in runs] for name in names if name not in _PLACES}
    return {name: values for name, values in found.items() if any(one != values[0] for one in values)}


def other_differences(runs: Sequence[RunReport]) -> dict[str, list[Any]]:
    """The same of plugins, versions and machines."""
    kinds = [
        [{f"plugin {name}": origin for name, origin in run.plugins.items()} for run in runs],
        [{f"version of {name}": version for name, version in run.packages.items()} for run in runs],
        [{name.replace("_", " "): one for name, one in run.machine.items()} for run in runs],
        [{f"precision: {name}": one for name, one in run.precision.items()} for run in runs],
    ]
    found: dict[str, list[Any]] = {}
    for each in kinds:
        for name in dict.fromkeys(name for values in each for name in values):
            found[name] = [values.get(name) for values in each]
    return {name: values for name, values in found.items() if any(one != values[0] for one in values)}


def value(one: Any) -> str:
    """The value of a setting, as one would type it."""
    if one is None:
        return "unset"
    if isinstance(one, bool):
        return str(one).lower()
    if isinstance(one, list):
        return ", ".join(map(value, one)) or "none"
    if isinstance(one, dict):  # facts of a machine; no setting is one
        return ", ".join(f"{name.replace('_', ' ')} {value(of)}" for name, of in one.items()) or "none"
    return str(one)


def _last(curve: Curve, form: str) -> tuple[str, str]:
    first, last = form.format(curve.values[0]), form.format(curve.values[-1])
    return last, f"{first} at step {curve.steps[0]:,}" if len(curve.values) > 1 else ""


def _counted(counts: Mapping[str, Any]) -> list[str]:
    known = {one.name for one in dataclasses.fields(Counts)}
    found = Counts(**{name: one for name, one in counts.items() if name in known and isinstance(one, int)})
    said = found.events()
    return [
        f"{found.records:,} records, {found.tokens:,} tokens, {found.target_tokens:,} of them learned",
        *(said or ["nothing is skipped, cut, dropped or rewritten"]),
    ]


def _of_sets(counts: Mapping[str, Any]) -> list[str]:
    sets = counts.get("sets")
    if not isinstance(sets, dict):
        return []
    return [f"{name}: {'; '.join(_counted(one))}" for name, one in sets.items() if isinstance(one, dict)]
