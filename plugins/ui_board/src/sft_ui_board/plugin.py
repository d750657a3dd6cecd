"""Plugin ``board``: ``sft board``, a page that follows runs live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    import click


class Board(sft.Plugin):
    """Adds the command. It touches no run: what a run is asked goes through files in its folder."""

    name = "board"
    api_version = ">=1.1,<2"
    summary = "A page that follows runs live, with buttons to stop, save and evaluate: sft board."

    @sft.hookimpl
    def sft_commands(self, cli: click.Group) -> None:
        from sft_ui_board.command import command

        cli.add_command(command)
