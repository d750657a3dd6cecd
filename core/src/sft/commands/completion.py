"""``sft completion``: what lets a shell complete commands, settings, their values and plugins."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(name="completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print what lets SHELL complete the words of sft: commands, settings, their values, and plugins.

    Write it where the shell looks for it, and start a new shell: for bash
    ~/.local/share/bash-completion/completions/sft, for zsh a file _sft in a folder of fpath, for fish
    ~/.config/fish/completions/sft.fish.
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(click.get_current_context().find_root().command, {}, "sft", "_SFT_COMPLETE").source())
