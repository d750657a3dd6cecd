"""``sft blame RUN``: which records made the loss or the gradients of a run jump."""

from __future__ import annotations

from pathlib import Path

import click

from sft.commands.completing import complete_path
from sft.commands.replay import MOVED
from sft.commands.shared import page_option, path_of, put_found, say, setting_options
from sft.errors import UsageError


@click.command(name="blame")
@click.argument("run", metavar="RUN", callback=path_of, shell_complete=complete_path)
@click.option("--most", metavar="N", type=int, default=10, help="The most steps to be computed again.  [default: 10]")
@page_option("sft blame")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
@setting_options(*MOVED, **MOVED)
def command(run: str, most: int, html: Path | None, as_json: bool, **moved: str | None) -> None:
    """Name the records that made the loss or the gradients of a run jump.

    RUN is the output_dir of a run, which is not changed. Steps whose loss (up or down) or gradient norm stands out
    among those around them are computed again, as `sft replay` does it, and the records are named that made them so.
    """
    if most < 1:
        raise UsageError(f"most: expected a number of steps from 1 on, got {most}.")
    from sft.replay import words
    from sft.replay.blame import blame
    from sft.replay.opened import OpenedRun
    from sft.replay.page import page_of_blame

    found = blame(OpenedRun.of(Path(run).expanduser(), moved), most, say)
    put_found(found, html, page_of_blame, as_json, words.of_blame)
