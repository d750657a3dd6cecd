"""``sft replay RUN --step N``: a step of a run computed again, with its records and the loss of each token."""

from __future__ import annotations

from pathlib import Path

import click

from sft.commands.completing import complete_path
from sft.commands.shared import page_option, path_of, put_found, say, setting_options
from sft.errors import UsageError

MOVED = {
    "model_name_or_path": "where the model of the run is now, if it has moved",
    "tokenizer_name_or_path": "where its tokenizer is now, if it has one of its own",
    "dataset_name_or_path": "where its data are now, if they have moved",
}


@click.command(name="replay")
@click.argument("run", metavar="RUN", callback=path_of, shell_complete=complete_path)
@click.option("--step", "steps", metavar="N", type=int, multiple=True, required=True, help="A step (repeatable).")
@click.option("--show", metavar="N", type=int, default=10, help="So many records of each step.  [default: 10]")
@page_option("sft replay")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on standard output, and nothing else.")
@setting_options(*MOVED, **MOVED)
def command(run: str, steps: tuple[int, ...], show: int, html: Path | None, as_json: bool, **moved: str | None) -> None:
    """Compute a step of a run again, from the nearest checkpoint.

    RUN is the output_dir of a run, which is not changed. It says which records the step had, with file and line, the
    loss of each, and whether loss and gradient norm are those that the run has recorded, to the last bit; and names
    what is not as it was then: machine, arithmetic, versions, plugins or data. With --json also tokens, masks and the
    loss of each token.
    """
    if show < 0:
        raise UsageError(f"show: expected a number of records from 0 on, got {show}.")
    from sft.replay import words
    from sft.replay.opened import OpenedRun
    from sft.replay.page import page_of_replay
    from sft.replay.replay import replay

    found = replay(OpenedRun.of(Path(run).expanduser(), moved), steps, say)
    put_found(found, html, page_of_replay, as_json, lambda found: words.of_replay(found, show))
