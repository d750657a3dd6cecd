"""``sft run [SETTINGS.yaml|.json|.toml] [--plugin NAME …] [--name value …]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sft.commands.completing import SettingsCommand
from sft.commands.failures import following
from sft.commands.shared import option_row
from sft.commands.typed import collect, requested
from sft.errors import SftError, SignalError
from sft.files import read_report
from sft.language import package_of, translated
from sft.options import options_of
from sft.settings.arguments import GROUPS
from sft.settings.names import Names
from sft.settings.words import with_words
from sft.small_files import check_path

PRINTS = ("--print_settings", "--print-settings")


@click.command(
    name="run",
    cls=SettingsCommand,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1)
def command(arguments: tuple[str, ...]) -> None:
    """Fine-tune a model."""
    wants_help = any(argument in ("--help", "-h") for argument in arguments)
    prints = any(argument in PRINTS for argument in arguments)
    values = collect([argument for argument in arguments if argument not in ("--help", "-h", *PRINTS)])
    if wants_help:
        click.echo(help_text(values))
        return
    if prints:
        from sft.commands.settings_file import resolved

        click.echo(resolved(values), nl=False)
        return
    from sft.commands.summary import tell_summary
    from sft.fine_tune import carry_out, prepare_run

    following(values)
    named = str(values.get("output_dir"))
    check_path("output_dir", named)
    folder = Path(named).expanduser()
    earlier = read_report(folder)
    try:
        run = prepare_run(values, ())
        summary = carry_out(run)
    except KeyboardInterrupt as error:
        stopped = SftError(_interrupted(values, error, folder, earlier))
        stopped.exit_code = getattr(error, "exit_code", 130)
        raise stopped from None
    if summary.speaks:
        tell_summary(summary, run.progress)


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


HEAD = """\
Usage: sft run [SETTINGS.yaml|.json|.toml] [--plugin NAME ...] [--name value ...]

Fine-tune a model. Without an adapter plugin all parameters train. Names may have dashes or underscores.

  --plugin NAME  switch a plugin on (repeatable; no:NAME switches it off; or the path of a file, ./x.py);
                 its settings then show here
  --print_settings
                 run nothing, and print the resolved settings as a file that `sft run FILE` reads"""
TAIL = "With --plugin NAME its settings are listed too; `sft plugins` lists the plugins."


def help_text(values: dict[str, Any]) -> str:
    """Every setting of the core and of the requested plugins, under its heading, in the reader's language."""
    active, names = requested(values)
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
