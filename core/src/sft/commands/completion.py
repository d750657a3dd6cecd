"""``sft completion``: what lets a shell complete commands, settings, their values and plugins."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(name="completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print what lets SHELL complete the words of sft: commands, settings, their values, and plugins.

    \b
    bash: sft completion bash > ~/.local/share/bash-completion/completions/sft
    zsh:  sft completion zsh > ~/.zfunc/_sft
          (with fpath+=~/.zfunc before compinit in ~/.zshrc)
    fish: sft completion fish > ~/.config/fish/completions/sft.fish

    Then start a new shell.
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(click.get_current_context().find_root().command, {}, "sft", "_SFT_COMPLETE").source())
