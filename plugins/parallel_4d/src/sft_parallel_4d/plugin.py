"""Plugin ``parallel-4d``: so far the command ``sft plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sft
from sft import UsageError

if TYPE_CHECKING:
    import click

    from sft import Run


class Parallel4d(sft.Plugin):
    """Says what each way of dividing a run among devices would need; it does not divide one yet."""

    name = "parallel-4d"
    summary = "Plan how a run is divided among devices: memory and communication of each legal plan."
    reference = "arXiv 1909.08053, 1910.02054, 1811.06965, 2205.05198"

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_parallel_4d.command import command

        cli.add_command(command)

    @sft.hookimpl
    def sft_check(self, run: Run) -> None:
        raise UsageError("Plugin parallel-4d plans runs (sft plan) and cannot divide one yet; leave it out.")
