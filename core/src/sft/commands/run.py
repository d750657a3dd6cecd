"""``sft run [SETTINGS.json|.yaml] [--plugin NAME …] [--name value …]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sft import hookspecs
from sft.commands.shared import named_values, option_row
from sft.errors import SftError, SignalError, UsageError
from sft.files import read_report
from sft.foreign_text import safe
from sft.language import package_of, translated
from sft.options import options_of
from sft.plugins.files import with_files
from sft.plugins.registry import Plugins
from sft.plugins.requests import by_device, choose_plugins, explicit
from sft.run_report.value import PAGE
from sft.settings.arguments import GROUPS, core_options
from sft.settings.names import Names
from sft.settings.reading import normalise, read_file
from sft.settings.words import shared_settings, with_words
from sft.small_files import check_path


@click.command(
    name="run",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Fine-tune a model."""
    wants_help = any(argument in ("--help", "-h") for argument in arguments)
    values = collect([argument for argument in arguments if argument not in ("--help", "-h")])
    if wants_help:
        click.echo(help_text(values))
        return
    from sft.fine_tune import run

    named = str(values.get("output_dir"))
    check_path("output_dir", named)
    folder = Path(named).expanduser()
    earlier = read_report(folder)
    try:
        summary = run(values)
    except KeyboardInterrupt as error:
        stopped = SftError(_interrupted(values, error, folder, earlier))
        stopped.exit_code = getattr(error, "exit_code", 130)
        raise stopped from None
    if summary.speaks:
        report(summary)


def _interrupted(values: dict[str, Any], error: KeyboardInterrupt, folder: Path, earlier: dict[str, Any]) -> str:
    """What to type to go on after Ctrl-C or another signal, in a sentence that is true of what the run had written."""
    from sft.training.checkpoint_folder import checkpoints

    report = read_report(folder)
    if report == earlier:
        return "interrupted before anything was written."
    if report.get("status") == "finished":
        return f"interrupted when the run had finished; its result is in {folder}."
    found = checkpoints(folder)
    without = " and without --overwrite_output_dir" if "overwrite_output_dir" in values else ""
    moment = f" {error.moment}" if isinstance(error, SignalError) and error.moment else ""
    goes_on = f"goes on from {found[-1].name}" if found else "begins again, for there is no checkpoint yet"
    return f"interrupted{moment}; the same command with --resume_from_checkpoint auto{without} {goes_on}."


def collect(arguments: list[str]) -> dict[str, Any]:
    """The settings file's values overridden by the command line's; the last one given counts, plugins add up. Raises
    :class:`UsageError` for what is no setting, and for a file that cannot be read."""
    loose, given, plugins = named_values(arguments)
    if len(loose) > 1:
        raise UsageError(f"Unexpected {loose[1]!r}; settings are given as --name value.")
    path = loose[0] if loose else None
    values = normalise(read_file(Path(path))) if path is not None else {}
    of_file = values.pop("plugin", [])
    if isinstance(of_file, str):
        of_file = of_file.split(",")
    values.update(given)
    if of_file or plugins:
        values["plugin"] = [*of_file, *plugins] if isinstance(of_file, list) else of_file
    return values


HEAD = """\
Usage: sft run [SETTINGS.json|.yaml] [--plugin NAME ...] [--name value ...]

Fine-tune a model. Without an adapter plugin all parameters train. Names may have dashes or underscores.

  --plugin NAME  switch a plugin on (repeatable; no:NAME switches it off; or the path of a file, ./x.py);
                 its settings then show here"""
TAIL = "With --plugin NAME its settings are listed too; `sft plugins` lists the plugins."


def help_text(values: dict[str, Any]) -> str:
    """Every setting of the core and of the requested plugins, under its heading, in the reader's language."""
    values, files = with_files(values)
    names, _ = choose_plugins(values, core_options(), shared_settings())
    active = Plugins.load(names, hookspecs, files, explicit(values), by_device(values))
    lines = [translated(HEAD)]
    for group, cls in GROUPS.items():
        heading = translated(f"{group.capitalize()} arguments")
        lines += ["", f"{heading}: {translated((cls.__doc__ or '').strip())}"]
        lines += [option_row(with_words(option, active)) for option in options_of(cls).values()]
    shared = Names(active)
    for name, plugin in active:
        package = package_of(plugin)
        summary = translated(getattr(plugin, "summary", ""), package)
        lines += ["", f"{translated('Plugin')} {name} ({active.origin(name)}): {summary}"]
        declared = getattr(plugin, "Options", None)
        if declared is not None:
            rows = options_of(declared).values()
            lines += [option_row(option, shared.written(name, option.name), package) for option in rows]
    if not names:
        lines += ["", translated(TAIL)]
    return "\n".join(lines)


def report(summary: Any) -> None:
    """The end of a run, in a few lines."""
    lines = ["", f"done: {summary.steps} steps ({summary.epochs:.2f} epochs) in {summary.seconds:.1f} s"]
    if summary.stopped_early is not None:
        lines.append(f"  ended early after step {summary.stopped_early['step']}: {summary.stopped_early['reason']}")
    lines.append(f"  train loss  {_fall(summary.train_loss_first, summary.train_loss_last)}")
    if summary.eval_loss_after is not None:
        lines.append(f"  dev loss    {_fall(summary.eval_loss_before, summary.eval_loss_after)}")
    lines.append(f"  trained     {summary.trainable_parameters:,} of {summary.total_parameters:,} parameters")
    padded = 100 * summary.padding_tokens / max(1, summary.tokens + summary.padding_tokens)
    lines.append(
        f"  tokens      {summary.tokens:,} in {summary.rows:,} rows ({summary.target_tokens:,} targets), "
        f"{summary.padding_tokens:,} padding ({padded:.1f} %)"
    )
    for split, counts in summary.data.items():
        if counts["records_skipped"]:
            these = f"{counts['records_skipped']:,} of {counts['records']:,} {split} records"
            lines.append(f"  skipped     {these}, which cannot be read (bad_records.jsonl)")
    if summary.skipped_steps:
        lines.append(f"  skipped     {summary.skipped_steps:,} steps that changed nothing")
    lines.append(f"  peak memory {summary.peak_memory_mib:,} MiB")
    lines.append(f"  written to  {summary.output_dir}")
    for sample in summary.samples:
        lines += [
            "",
            f"prompt: {_block(sample['prompt'])}",
            f"  before: {_block(sample['before'])}",
            f"  after:  {_block(sample['after'])}",
        ]
    page = summary.output_dir / PAGE
    if page.is_file():
        lines += ["", f"report: {page}"]
    click.echo(safe("\n".join(lines)))


def _block(text: str) -> str:
    """Lines of data or of a model, which cannot be taken for ours."""
    return text.replace("\n", "\n    ")


def _fall(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"
