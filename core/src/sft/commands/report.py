"""``sft report RUN [RUN …]``: a run, or several side by side, as a page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sft.commands.completing import complete_path
from sft.commands.shared import path_of, say
from sft.run_report.value import PAGE
from sft.small_files import check_path


@click.command(name="report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_path)
@click.option(
    "--html",
    metavar="FILE",
    callback=path_of,
    shell_complete=complete_path,
    help="Where the page goes, with its JSON beside it.  [default: report.html in the run's folder, of several here]",
)
@click.option("--json", "as_lines", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
def command(runs: tuple[str, ...], html: str | None, as_lines: bool) -> None:
    """Show a run as a page: its curves, its answers, how its rows were filled, what was skipped, its settings.

    RUN is the output_dir of a run that has finished, has failed or is still training. Of several runs the curves lie
    over each other, and a table has the settings that differ. The page is one file that needs no network; beside it
    lies the same as JSON. A run writes its own when it ends.
    """
    for run in runs:
        check_path("RUN", run)
    from sft.run_report.gather import read_run
    from sft.run_report.words import apart
    from sft.run_report.written import as_json, check, write

    folders = [Path(run).expanduser() for run in runs]
    place = Path(html).expanduser() if html is not None else (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    found = apart([read_run(folder) for folder in folders])
    if html is not None or not as_lines:
        check(place)
        write(place, found)
        say(f"written to {place}")
    if as_lines:
        click.echo(json.dumps(as_json(found), allow_nan=False))
