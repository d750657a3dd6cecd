"""What is not as it was when a run computed its steps: by what its ``run.json`` says, and a replay's own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sft import arithmetic
from sft.data.sets import open_sets
from sft.errors import UsageError
from sft.foreign_text import shown
from sft.models.fingerprint import has_fingerprint
from sft.replay.opened import Leg, OpenedRun
from sft.training.resume_checks import check_same_base

if TYPE_CHECKING:
    from sft.context import CoreRun
    from sft.data.batches import Schedule
    from sft.training.checkpoint_folder import Checkpoint

_OLD = ("cpu", "cores", "device", "threads")
"""Of a machine, what the runs of earlier versions say that wrote no arithmetic."""
_SHOWN_FILES = 3


def check_base(run: CoreRun, opened: OpenedRun, resumed: Checkpoint | None) -> None:
    """Refuse another base model than that of the run, as a resume does: where the whole model trains, only at the
    beginning, for a checkpoint has all of it."""
    if resumed is not None:
        check_same_base(run, resumed.folder)
        return
    expected = opened.record.get("base_fingerprint")
    if expected is not None and not has_fingerprint(run.source, expected):
        raise UsageError(
            f"{opened.folder} began with other weights than those of {run.source.folder}; put the model back as it "
            "was, or say with --model_name_or_path where it is."
        )


def differences(opened: OpenedRun, leg: Leg, now: Mapping[str, Any]) -> list[str]:
    """Clauses on what ``now``, the ``run.json`` of a replay, says otherwise than that of the run, for a ``leg``."""
    then = opened.record
    found = []
    if leg.arithmetic is not None:
        found.append(("arithmetic", arithmetic.differences(leg.arithmetic, now["arithmetic"])))
    else:
        found.append(("machine", _changed({name: then.get("machine", {}).get(name) for name in _OLD}, now["machine"])))
    for what in ("packages", "plugins", "precision"):
        found.append((what, _changed(then.get(what, {}), now[what])))
    found.append(("plugin files", _changed(_digests(then), _digests(now))))
    return [f"{what}: {text}" for what, text in found if text]


def _digests(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: file["sha256"][:12] for name, file in record.get("plugin_files", {}).items()}


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not the same, of what both say: a plugin that only watches is not in a replay."""
    names = [name for name in then if name in now and then[name] is not None and then[name] != now[name]]
    return ", ".join(f"{name} {shown(then[name])} (now {shown(now[name])})" for name in names)


def other_processes(leg: Leg, opened: OpenedRun) -> list[str]:
    """A clause on how many processes the run had, where it had several."""
    processes = opened.processes(leg)
    if processes == 1:
        return []
    return [
        f"processes: {processes} (now 1, so sums are made in another order, and dropout and noise are drawn otherwise)"
    ]


def other_data(run: CoreRun, opened: OpenedRun, schedule: Schedule, resumed: Checkpoint | None) -> list[str]:
    """A clause where the tokens to train on are not those of the run; it names the files that have changed since."""
    said = resumed.state["data"] if resumed is not None else opened.record.get("schedule", {})
    expected = said.get("fingerprint")
    if expected is None or schedule.data.has_fingerprint(str(expected)):
        return []
    began = datetime.fromisoformat(opened.record["started"]).timestamp()
    sets = open_sets(run.settings.data, run.plugins, run.progress, run.files_of)
    newer = [str(path) for one in sets.train for path in one.files if path.stat().st_mtime > began]
    if not newer:
        return ["data: other tokens (no file is newer than the run, so tokenizer, template or reading are others)"]
    more = f" and {len(newer) - _SHOWN_FILES:,} more" if len(newer) > _SHOWN_FILES else ""
    files = ", ".join(map(shown, newer[:_SHOWN_FILES]))
    return [f"data: {files}{more}, changed since, so these are not the records of the run's step"]


def legs_between(opened: OpenedRun, start: int, leg: Leg) -> list[str]:
    """A clause where the run went on with other settings, or another arithmetic, on the way, and nothing is left of the
    checkpoint from which it did."""
    if leg.after <= start:
        return []
    return [f"settings: the run went on from step {leg.after} with others than before, and that checkpoint is gone"]
