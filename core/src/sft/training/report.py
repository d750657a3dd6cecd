"""``run.json``: what a run is, how far it is, and what came of it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sft import runtime
from sft.context import CoreRun, Run, Summary
from sft.errors import PluginError, SftError
from sft.files import read_report, write_json
from sft.folder_lock import is_used
from sft.foreign_text import shown, without_secrets
from sft.hub_names import commit_of
from sft.models.layers import trained_by_layer
from sft.plugins.discovery import dependencies

if TYPE_CHECKING:
    from sft.data.batches import Schedule

PACKAGES = ("sft-core", "paddlepaddle", "paddlepaddle-gpu", "numpy", "tokenizers")
"""Those whose versions ``run.json`` has, beside what the distributions of active plugins depend on."""


def describe(run: CoreRun, schedule: Schedule | None) -> dict[str, Any]:
    """The part of ``run.json`` that is known before training: settings, plugins with versions, machine, data, what
    trains, and what is needed to compute a step again. ``schedule`` is None where nothing trains."""
    packages = {}
    for name in (*PACKAGES, *dependencies(run.plugins.names)):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    places = {"model": run.source.folder, "tokenizer": run.tokenizer.folder}
    return {
        "started": datetime.now().astimezone().isoformat(timespec="microseconds"),  # no two runs write the same
        "date": run.tokenizer.now.isoformat(),
        "settings": run.settings.written(),
        "changed": dict(without_secrets(run.settings.changed())),
        "without_effect": [[shown(name), shown(why)] for name, why in run.without_effect],
        "total_steps": None if schedule is None else schedule.total_steps,
        "given": sorted(run.settings.given),
        **({} if schedule is None else {"schedule": schedule.written()}),
        "base_fingerprint": run.base_fingerprint,
        "hub": {what: found for what, folder in places.items() if (found := commit_of(folder)) is not None},
        "plugins": {name: run.plugins.origin(name) for name in run.plugins.names},
        **({"plugin_files": files} if (files := run.plugins.files_written()) else {}),
        "packages": packages,
        "machine": runtime.machine(),
        "arithmetic": run.arithmetic,
        **({"other_arithmetic": run.other_arithmetic} if run.other_arithmetic else {}),
        **({"earlier": run.earlier} if run.earlier else {}),
        **({"of_plugins": said} if (said := _of_plugins(run)) else {}),
        "precision": asdict(run.precision),
        "data": _counts(run),
        "parameters": {
            **dict(zip(("trained", "total"), run.sizes, strict=True)),
            "layers": trained_by_layer(dict(run.strategy.parameters(run.model)), run.model),
        },
    }


def _of_plugins(run: CoreRun) -> dict[str, Any]:
    """What plugins say of themselves (``sft_run_record``), by their names."""
    found = {}
    for name in run.plugins.implementing("sft_run_record"):
        said = run.plugins.ask(name, "sft_run_record", run=run)
        if said:
            try:
                json.dumps(said, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise PluginError(
                    f"{run.plugins.who(name)} answers sft_run_record with what run.json cannot hold ({error}); give "
                    "JSON values, or leave the plugin out."
                ) from error
            found[name] = said
    return found


def summarise(run: CoreRun, journal: Any, steps: int, epochs: float, after: dict[str, Any], seconds: float) -> Summary:
    """The numbers that a run ends with."""
    count, total = run.sizes
    # A run that resumes with a larger num_samples has not asked all of them before training.
    answers = zip_longest(run.before.get("samples", [])[: len(run.samples)], after.get("samples", []), fillvalue="")
    samples = [
        {"prompt": question.prompt, "before": before, "after": later, "reference": question.reference}
        for question, (before, later) in zip(run.samples, answers, strict=True)
    ]
    return Summary(
        output_dir=run.output_dir,
        steps=steps,
        epochs=epochs,
        seconds=round(seconds, 1),
        train_loss_first=journal.first_loss,
        train_loss_last=journal.last_loss,
        eval_loss_before=run.before.get("eval_loss"),
        eval_loss_after=after.get("eval_loss"),
        trainable_parameters=count,
        total_parameters=total,
        tokens=journal.total.tokens,
        target_tokens=journal.total.target_tokens,
        padding_tokens=journal.total.padding_tokens,
        rows=journal.total.rows,
        skipped_steps=journal.skipped_steps,
        peak_memory_mib=runtime.peak_memory_mib(),
        data=_counts(run),
        samples=samples,
        stopped_early=run.stopped_early,
        speaks=run.strategy.is_main,
    )


def _counts(run: CoreRun) -> dict[str, Any]:
    """What has become of the records so far."""
    splits = {"train": run.train_data, "dev": run.dev_data}
    return {split: records.report() for split, records in splits.items() if records is not None}


def write_report(run: CoreRun, record: dict[str, Any]) -> None:
    """``run.json``, written once however many processes there are."""
    if run.strategy.is_main:
        write_json(run.output_dir / "run.json", record)


def close_report(run: Run, error: BaseException) -> None:
    """:func:`write_end`, after which others may use the folder: this process may end before it comes to any other
    end."""
    assert isinstance(run, CoreRun)
    write_end(run, error)
    run.release_lock()


def write_end(run: CoreRun, error: BaseException) -> None:
    """Let ``run.json`` say that the run has failed, and of what, or was interrupted; where it has been written by this
    run, or by the processes that this one has started for it, and says that the run goes on."""
    record = own_report(run)
    if record.get("status") != "running":
        return
    stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
    end = {"status": "interrupted"} if stopped else {"status": "failed", "error": sentence(error)}
    moment = f" ({error})" if str(error) else ""
    run.progress.note(f"the run was interrupted{moment}" if stopped else f"the run has failed: {end['error']}")
    with contextlib.suppress(OSError):  # what has ended the run is what counts
        write_json(run.output_dir / "run.json", {**record, **end})


def own_report(run: CoreRun) -> dict[str, Any]:
    """``run.json`` where this process has written it, or processes that it has started for the run; otherwise empty.

    The file itself tells: no moment lies between its writing and the knowledge of it.
    """
    if run.executes and not (run.lock is not None and run.lock.is_held):
        return {}
    if not run.executes and is_used(run.output_dir):  # by a run that was there before
        return {}
    written = read_report(run.output_dir)
    return written if written != run.earlier_report else {}


def sentence(error: BaseException) -> str:
    """An error as one line: with its type, unless it was written for users."""
    text = str(error) if isinstance(error, (SftError, OSError)) else f"{type(error).__name__}: {error}"
    return shown(" ".join(text.split()), 4_000)
