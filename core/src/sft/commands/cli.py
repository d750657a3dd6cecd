"""The command line: one small module for each command, loaded when it is typed."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from typing import Any

import click

from sft import runtime
from sft.commands.failures import Failures
from sft.commands.words import in_readers_language
from sft.errors import PluginError, SftDeprecationWarning, SftError, UsageError
from sft.foreign_text import safe
from sft.language import translated

COMMANDS = {
    "init": "Ask a few questions and write a settings file for a run.",
    "run": "Fine-tune a model.",
    "data": "Show what the model will see of the data, before it is trained.",
    "replay": "Compute a step of a run again: its records, and the loss of each token.",
    "blame": "Name the records that made the loss of a run jump.",
    "demo": "Fine-tune the tiny embedded model and show what it learned.",
    "report": "Show a run, or several side by side, as a page.",
    "merge": "Fold an adapter into its base model.",
    "export": "Write a finished model in another form.",
    "evaluate": "Measure a model on data, with or without an adapter.",
    "generate": "Answer prompts with a model, with or without an adapter.",
    "chat": "Talk with a model in the terminal, with or without an adapter.",
    "plugins": "List the installed plugins, and check what one declares.",
    "completion": "Print what lets a shell complete the words of sft.",
    "certify": "Try on tiny models what a plugin must keep, beside all others.",
}


class _Commands(click.Group):
    """Knows the commands by name; imports the module of the one that is typed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from sft.plugins.requests import requests

        return [*COMMANDS, *sorted(set(requests("command")) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            return in_readers_language(importlib.import_module(f"sft.commands.{name}").command)
        try:
            found = super().get_command(ctx, name) or self._from_plugin(name)
        except SftError:
            if ctx.resilient_parsing:  # a shell completes a word: one command less is offered
                return None
            raise
        return None if found is None else in_readers_language(found)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from sft.plugins.discovery import ALL_OF_PROJECT

            raise UsageError(
                f"There is no command {args[0]!r}; `sft --help` lists the commands, and plugins add to them "
                f"({ALL_OF_PROJECT})."
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from sft.plugins.requests import requests

        rows = [(name, translated(text)) for name, text in COMMANDS.items()]
        others = sorted(requests("command").items())
        source = translated("from plugin")
        rows += [(name, f"{source} {', '.join(names)}") for name, names in others if name not in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _from_plugin(self, name: str) -> click.Command | None:
        from sft import hookspecs
        from sft.plugins.discovery import with_refined
        from sft.plugins.registry import Plugins
        from sft.plugins.requests import origins, requests
        from sft.settings.reading import build

        plugins = requests("command").get(name)
        if not plugins:
            return None
        if len(plugins) > 1:
            raise UsageError(f"sft {name} is declared by plugins {origins(plugins)}; pip uninstall one of them.")
        active = Plugins.load(with_refined(plugins[0]), hookspecs)
        active.start(build({}, active).options)
        active.hook.sft_commands(cli=self)
        if name not in self.commands:
            raise UsageError(
                f"{active.who(plugins[0])} declares the command {name} and adds none of that name; upgrade it."
            )
        return self.commands[name]


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sft-core", prog_name="sft")
@click.pass_context
def cli(context: click.Context) -> None:
    """Supervised fine-tuning of large language models on PaddlePaddle; every technique is a plugin.

    Start with `sft demo`, then `sft run --help`.
    """
    from sft.plugins.discovery import left_out

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text in letters that the locale has not
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    elif context.invoked_subcommand != "run" and left_out() is not None:  # a run says it with its other notes
        click.echo(f"note: {left_out()}", err=True)


def main() -> None:
    """The console script: errors that a user can cure are one line, with exit code 2."""
    code = 0
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        is_ours = issubclass(category, SftDeprecationWarning)
        return f"note: {safe(str(message))}\n" if is_ours else usual(message, category, *place, **more)

    failures = Failures()
    warnings.formatwarning = plain
    try:
        in_readers_language(cli).main(standalone_mode=False, obj=failures)
    except PluginError as error:
        code = failures.tell(str(error), error.exit_code, error.details())
    except SftError as error:
        code = failures.tell(str(error), error.exit_code)
    except click.ClickException as error:
        code = failures.tell(error.format_message(), 2)
    except MemoryError as error:
        from sft.training.out_of_memory import said

        code = failures.tell(f"Out of memory ({said(error)}): take a smaller model, or smaller batches.", 1)
    except OSError as error:
        # The machine's fault, not a bug: a full disk, a folder that went away.
        code = failures.tell(str(error), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        code = failures.tell("interrupted", getattr(cause, "exit_code", 130))
    if runtime.processes_of_run() > 1:
        runtime.leave(code)
    if code:
        sys.exit(code)
