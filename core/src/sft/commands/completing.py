"""What a shell is told that completes a word: settings by name, what each can be, and plugins.

Nobody sees an error here: where what has been typed so far makes no sense, less is offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from sft.commands.typed import collect, requested
from sft.options import Option, options_of
from sft.plugins.discovery import installed
from sft.settings.arguments import core_options
from sft.settings.names import Names
from sft.settings.words import with_words


class SettingsCommand(click.Command):
    """A click command that takes the settings of a run, in an argument of any number of words (``nargs=-1``, unknown
    options ignored), for :func:`sft.collect`. Shells complete them as behind `sft run`: names, values, the file."""

    def __init__(self, *arguments: Any, **given: Any) -> None:
        super().__init__(*arguments, **given)
        for one in self.params:
            if isinstance(one, click.Argument) and one.nargs == -1:
                one.type = _Words()

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        found = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("-"):
            return found
        dashes = "-" in incomplete[2:]
        for name, option in {**_declared(_typed(ctx)), "plugin": _PLUGIN}.items():
            word = f"--{name.replace('_', '-') if dashes else name}"
            if word.startswith(incomplete):
                found.append(CompletionItem(word, help=option.help))
        return found


_PLUGIN = Option("plugin", str, None, "switch a plugin on (no:NAME: off)")


class _Words(click.types.UnprocessedParamType):
    """Settings as they were typed."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """What stands behind the name of a setting; and where no name stands before it, the settings file."""
        typed = _typed(ctx)
        name = typed[-1] if typed else ""
        if not name.startswith("--") or "=" in name:
            return [CompletionItem(incomplete, type="file")]
        name = name[2:].replace("-", "_")
        if name == "plugin":
            return complete_plugin(ctx, param, incomplete)
        option = _declared(typed[:-1]).get(name)
        return [] if option is None else values_of(option, incomplete)


def values_of(option: Option, incomplete: str) -> list[CompletionItem[str]]:
    """What a setting can be, as far as that is a list of words or a path."""
    if option.is_path:
        return [CompletionItem(incomplete, type="file")]
    return [CompletionItem(word) for word in option.words if word.startswith(incomplete)]


def complete_plugin(
    context: click.Context | None, parameter: click.Parameter | None, incomplete: str
) -> list[CompletionItem[str]]:
    """Completes the name of an installed plugin, behind ``no:`` too, or the path of a file that holds one."""
    if incomplete.startswith((".", "/", "~")):
        return [CompletionItem(incomplete, type="file")]
    before = "no:" if incomplete.startswith("no:") else ""
    return [CompletionItem(f"{before}{name}") for name in installed() if f"{before}{name}".startswith(incomplete)]


def _typed(context: click.Context) -> Sequence[str]:
    """The words that the command's one argument has taken so far."""
    return next((value for value in context.params.values() if isinstance(value, tuple)), ())


def _declared(typed: Sequence[str]) -> Mapping[str, Option]:
    """The settings that `sft run --help` would list behind these words."""
    core = core_options()
    try:
        active, _ = requested(collect(list(typed)))
        found = {name: with_words(option, active) for name, option in core.items()}
        shared = Names(active)
        for owner, cls in shared.classes.items():
            found |= {shared.written(owner, name): option for name, option in options_of(cls).items()}
        return found
    except Exception:
        return core


def as_option(option: Option) -> Any:
    """The same for a setting that is an option of a command of its own."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return values_of(option, incomplete)

    return complete


def complete_path(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Completes a file or folder."""
    return [CompletionItem(incomplete, type="file")]
