"""From the folder of a run to what is known of it. Whatever the folder holds, nothing in it is changed, and a file that
is half written, or that somebody has edited, costs no more than what it would have said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sft.errors import UsageError
from sft.files import read_report
from sft.folder_lock import holder_of
from sft.run_log import NAME as LOG
from sft.run_report.curves import curves_of, moments_of, number_of
from sft.run_report.value import Answers, Document, Given, Layer, Mask, Row, RunReport, Skipped
from sft.settings.arguments import core_options
from sft.small_files import read_object
from sft.training.answer_files import SAMPLES, files_of
from sft.training.checkpoint_folder import checkpoints, step_of
from sft.training.first_rows import NAME as ROWS
from sft.training.skipped_records import NAME as BAD_RECORDS
from sft.training.steps_file import NAME as STEPS
from sft.training.steps_file import StepFigures, read_steps
from sft.voice import NOTE
from sft.written_numbers import finite

SHOWN = 50
"""Notes that are shown, and records that cannot be read."""
_NOTE = re.compile(rf"{NOTE}|step \d+: (skipped|float16 overflow)")


def read_run(folder: Path | str) -> RunReport:
    """What the folder of a run says of it, whether it has finished, has failed or goes on. Raises :class:`UsageError`
    for a folder that holds no run."""
    folder = Path(folder)
    record = _object(finite(read_report(folder)))
    if not isinstance(record.get("settings"), dict):
        what = "holds no run of sft (its run.json is missing or cannot be read)" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {what}; give the output_dir of a run.")
    lines = [line for line in _lines(folder / "metrics.jsonl") if _whole(line.get("step")) is not None]
    settings, result = record["settings"], _object(record.get("result"))
    moments, trained = moments_of(lines), _object(record.get("parameters"))
    (rows, mask, packs), each = _rows(folder), _each_step(folder)
    told = max((line["step"] for line in lines), default=0)
    step = max(told, 0 if each is None else len(each))
    return RunReport(
        name=str(settings.get("run_name") or folder.resolve().name),
        folder=str(folder),
        status=_status(record, folder),
        error=str(record["error"]) if record.get("error") else None,
        started=str(record["started"]) if record.get("started") else None,
        step=step,
        total_steps=_whole(record.get("total_steps")),
        seconds=number_of(result.get("seconds"))
        or (moments.seconds[-1] if moments.seconds else 0.0) + (_since_the_last_line(folder) if step > told else 0.0),
        result=result,
        settings=settings,
        changed=_changed(record, settings),
        without_effect=[(str(name), str(why)) for name, why in _pairs(record.get("without_effect"))],
        plugins={str(name): str(origin) for name, origin in _object(record.get("plugins")).items()},
        packages={str(name): str(version) for name, version in _object(record.get("packages")).items()},
        machine=_object(record.get("machine")),
        arithmetic=_object(record.get("arithmetic")),
        precision=_object(record.get("precision")),
        hub=_object(record.get("hub")),
        notes=_notes(folder / LOG),
        counts={str(split): _object(counts) for split, counts in _counts(record, result).items()},
        skipped=_skipped(folder / BAD_RECORDS),
        skipped_steps=_whole(result.get("skipped_steps"))
        or (0 if each is None else int((each.known & ~each.taken).sum())),
        trained=_whole(trained.get("trained", result.get("trainable_parameters"))),
        total=_whole(trained.get("total", result.get("total_parameters"))),
        layers=_layers(trained.get("layers")),
        moments=moments,
        curves=curves_of(lines, each),
        evaluations=[line for line in lines if "eval_loss" in line],
        answers=_answers(folder, result),
        packs=packs,
        rows=rows,
        mask=mask,
        checkpoints=[step_of(path) for path in checkpoints(folder)],
    )


def _status(record: dict[str, Any], folder: Path) -> str:
    status = str(record.get("status") or "unknown")
    return "died" if status == "running" and holder_of(folder) is None else status


def _changed(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Runs of earlier versions did not write it down; of those, the core's settings are compared with its defaults."""
    said = record.get("changed")
    if isinstance(said, dict):
        return {name: said[name] for name in settings if name in said}
    declared = core_options()
    differ = (name for name, value in settings.items() if name in declared and value != declared[name].default)
    return {name: declared[name].default for name in differ}


def _counts(record: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """At its end a run has counted what a stream has brought since its beginning."""
    return _object(result.get("data")) or _object(record.get("data"))


def _notes(path: Path) -> list[str]:
    """The notes in a run's log, and its lines on steps that were left out; a log that is not there has none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            said = (line.partition(" ")[2].strip() for line in file)
            notes = dict.fromkeys(text.removeprefix(NOTE) for text in said if _NOTE.match(text))
            return list(islice(notes, SHOWN))
    except OSError:
        return []


def _each_step(folder: Path) -> StepFigures | None:
    try:
        return read_steps(folder)
    except UsageError:
        return None


def _since_the_last_line(folder: Path) -> float:
    """Seconds between the last line of metrics.jsonl and the last step, of which there is none yet."""
    try:
        return max(0.0, (folder / STEPS).stat().st_mtime - (folder / "metrics.jsonl").stat().st_mtime)
    except OSError:
        return 0.0


def _skipped(path: Path) -> Skipped:
    lines = _lines(path)
    first = list(islice(lines, SHOWN))
    return Skipped(len(first) + sum(1 for _ in lines), first)


def _layers(values: Any) -> list[Layer]:
    found = []
    for name, parts in _object(values).items():
        counts = {str(part): count for part, value in _object(parts).items() if (count := _whole(value)) is not None}
        found.append(Layer(str(name), counts))
    return found


def _answers(folder: Path, result: dict[str, Any]) -> list[Answers]:
    """What the model said, from the files that a run writes each time; of runs that wrote none, what run.json has."""
    ended = _whole(result.get("steps"))
    asked: dict[int, tuple[str, str, list[Given]]] = {}
    for step, path in files_of(folder, SAMPLES):
        when = "before" if step == 0 else "after" if step == ended else "during"
        for number, line in enumerate(_lines(path)):
            prompt, reference = str(line.get("prompt", "")), str(line.get("reference", ""))
            given = asked.setdefault(number, (prompt, reference, []))[2]
            given.append(Given(when, step, str(line.get("answer", ""))))
    samples = result.get("samples")
    for number, one in enumerate(samples if isinstance(samples, list) else ()):
        sample = _object(one)
        prompt, reference = str(sample.get("prompt", "")), str(sample.get("reference", ""))
        given = asked.setdefault(number, (prompt, reference, []))[2]
        last = str(sample.get("after", ""))
        if not given:
            given.append(Given("before", 0, str(sample.get("before", ""))))
        if given[-1].when == "after" and given[-1].text != last:  # the run has gone back to its best model
            given[-1] = Given("during", given[-1].step, given[-1].text)
        if given[-1].when != "after":
            given.append(Given("after", None, last))
    return [Answers(*one) for one in asked.values()]


def _rows(folder: Path) -> tuple[list[Row], Mask | None, bool]:
    """The first rows, who sees whom in one of them, and whether the run puts several records into a row."""
    try:
        said = read_object(folder / ROWS)
        rows = [
            Row(
                int(row["step"]),
                int(row["width"]),
                [Document(_whole(one["record"]), [int(count) for count in one["spans"]]) for one in row["documents"]],
            )
            for row in said["rows"]
        ]
        seen = said["mask"]
        mask = None if seen is None else Mask(int(seen["row"]), [(int(end), int(count)) for end, count in seen["ends"]])
        return rows, mask, bool(said["packs"])
    except (UsageError, ValueError, KeyError, TypeError, OverflowError):
        return [], None, False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of lines, without one that is being written."""
    try:
        with path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict):
                    yield _object(finite(line))
    except OSError:
        return


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _pairs(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else []
    return [pair for pair in found if isinstance(pair, list) and len(pair) == 2]


def _whole(value: Any) -> int | None:
    """A count, as far as a float tells them apart; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
