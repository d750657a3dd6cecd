"""Plugin ``why``: the command ``sft why``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    import click


class Why(sft.Plugin):
    """Adds ``sft why``, which names the training records that taught an answer. It has no part in a run."""

    name = "why"
    api_version = ">=1.1,<2"
    summary = "sft why: which training records taught an answer, by gradients at the checkpoints of the run."
    reference = "arXiv 2002.08484 (TracInCP)"

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_influence.command import command

        cli.add_command(command)
