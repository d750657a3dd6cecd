"""``sft data [SETTINGS.yaml|.json|.toml] [--name value …]``: what the model will see, before it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sft.commands.completing import SettingsCommand
from sft.commands.shared import page_option, put_page, say
from sft.commands.typed import collect
from sft.errors import UsageError

MOST_SHOWN = 10_000
_IN_TERMINAL, _FOUND, _IN_PAGE = 1, 10, 100


@click.command(
    name="data",
    cls=SettingsCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]},
    options_metavar="[--name value ...]",
)
@click.argument("arguments", nargs=-1, metavar="[SETTINGS.yaml|.json|.toml]")
@click.option(
    "--show",
    metavar="N",
    help="So many records, as the model reads them.  [default: 1, of found ones 10, in a page 100]",
)
@click.option("--find", metavar="TEXT", help="Records that hold this text, in upper or lower case, in their turns.")
@page_option("sft data", "Write it as one page, with search in the records.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
def command(arguments: tuple[str, ...], show: str | None, find: str | None, html: Path | None, as_json: bool) -> None:
    """Show what the model will see of the data, before it is trained.

    Takes the settings of `sft run` and its settings file, and reads the data as a run with them would; model and data
    must be named. No weights are read. It says what the records are and how long, what is cut, dropped or rewritten,
    which are equal or nearly so, what dev data shares with training data, how much is learned and how full rows are. It
    shows the first record with the chat template applied, and what is learned of it highlighted.
    """
    values = collect(list(arguments))
    number = _number(show, _FOUND if find is not None else _IN_TERMINAL)
    if find == "":
        raise UsageError("find: expected a text to look for, got an empty one.")
    if html is not None and show is None:
        number = _IN_PAGE
    from sft.data_report.gather import Wanted, data_report

    report = data_report(values, Wanted(number, find), say)
    if html is not None:
        from sft.data_report.page import page

        put_page(html, page(report))
    if as_json:
        click.echo(json.dumps(report.as_dict(), allow_nan=False))
    elif html is None:
        from rich.console import Console

        from sft.data_report.terminal import write

        write(report, Console(highlight=False, markup=False, emoji=False))


def _number(show: str | None, default: int) -> int:
    if show is None:
        return default
    if not (show.isascii() and show.isdigit() and len(show) < 10 and int(show) <= MOST_SHOWN):
        raise UsageError(f"show: expected a number of records from 0 to {MOST_SHOWN:,}, got {show!r}.")
    return int(show)
