"""What several commands share: options, and how they read standard input and say what they did."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import as_option, complete_path, complete_plugin
from sft.errors import UsageError
from sft.foreign_text import harmless
from sft.language import translated
from sft.options import Option, convert
from sft.plugins.requests import requests
from sft.settings.arguments import core_options
from sft.small_files import check_path
from sft.voice import Printer

MODEL = ("--model_name_or_path", "--model-name-or-path", "model")
PLUGIN = ("--plugin", "plugins")


OPENING = ("model_revision", "allow_pickle", "device", "bf16", "fp16", "fp16_opt_level", "require_precision")
"""The settings that say how a model is opened and in which precision it computes, in a run too."""

OPENING_HELP = {
    "fp16": "compute in float16 where the device can",
    "fp16_opt_level": "O1: float32 weights, 16-bit operations; O2, or unset: 16-bit weights",
}

GENERATION = ("max_new_tokens", "top_k", "top_p", "temperature", "seed")
"""The settings that say how answers are drawn."""

TEMPLATE = "file with a chat template, or none; unset: that of the adapter's run, else the model's own"

SEED = "seed of draws (top_k other than 1): the same seed and prompt give the same answer, in a batch or alone"


def adapter_names() -> tuple[str, ...]:
    """The names of the option that gives an adapter folder: ``adapter_path``, and those that installed plugins claim
    (``path.X``)."""
    names = ("adapter_path", *sorted(requests("path")))
    return (*(f"--{form}" for name in names for form in dict.fromkeys((name, name.replace("_", "-")))), "adapter")


def model_options(plugin: str) -> Callable[[Any], Any]:
    """The options that choose a finished model; ``plugin`` is what is said of --plugin."""

    def add(function: Any) -> Any:
        function = click.option(*PLUGIN, multiple=True, shell_complete=complete_plugin, help=plugin)(function)
        function = click.option(
            *adapter_names(),
            callback=path_of,
            shell_complete=complete_path,
            help="An adapter for it: the folder that a run wrote, or any PEFT adapter.",
        )(function)
        function = setting_options(*OPENING, **OPENING_HELP)(function)
        return click.option(
            *MODEL,
            required=True,
            shell_complete=complete_path,
            help="The model: a directory, a weight file in one, or a hub name.",
        )(function)

    return add


def tools_option(more: str = "") -> Callable[[Any], Any]:
    """The option that offers tools; ``more`` is said of them."""
    return click.option(
        "--tools",
        metavar="FILE",
        callback=path_of,
        shell_complete=complete_path,
        help=f"A JSON file with a list of tools that the model may call{', ' if more else ''}{more}.",
    )


def path_of(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The callback of an option that names a file or folder: refuses what no file can be called."""
    if value is not None:
        check_path(str(parameter.name), value)
    return value


def page_option(
    made_by: str, text: str = "Write it as one page, with tokens coloured by their loss."
) -> Callable[[Any], Any]:
    """The option ``--html FILE``, for the page of a program such as ``sft replay``; its value is the path of a place
    where nothing else would be lost, and ``text`` its help."""

    def place(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
        if value is None:
            return None
        from sft.pages import check_place

        path = Path(str(path_of(context, parameter, value))).expanduser()
        check_place(path, made_by)
        return path

    return click.option("--html", metavar="FILE", callback=place, shell_complete=complete_path, help=text)


def put_page(path: Path, page: str) -> None:
    """Write a page, and say where it is."""
    from sft.files import write_text

    write_text(path, page)
    say(f"written to {path}")


def put_found(
    found: Any, html: Path | None, page: Callable[[Any], str], as_json: bool, lines: Callable[[Any], Iterable[str]]
) -> None:
    """Give what has been ``found``: as a page where ``html`` says where, as a line of JSON, and else as lines."""
    if html is not None:
        put_page(html, page(found))
    if as_json:
        click.echo(json.dumps(found.as_dict(), allow_nan=False))
    elif html is None:
        for line in lines(found):
            print_line(line)


def setting_options(*names: str, **helps: str) -> Callable[[Any], Any]:
    """Options that are settings of `sft run`, with their names, defaults, checks and (unless ``helps`` has another
    one) help. Those that are not given are None."""
    declared = core_options()

    def add(function: Any) -> Any:
        for name in reversed(names):
            option = declared[name]
            text = helps.get(name, option.help)
            flag: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if option.is_flag else {}
            function = click.option(
                *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
                name,
                default=None,
                shell_complete=as_option(option),
                metavar="true|false" if option.is_flag else _kind(option),
                help=f"{text[0].upper()}{text[1:]}.{_default(option)}",
                **flag,
            )(function)
        return function

    return add


def _default(option: Option) -> str:
    if option.default is None or "; required" in option.help:
        return ""
    return f"  [default: {_shown_default(option)}]"


def option_row(option: Option, name: str | None = None, package: str = "sft") -> str:
    """A setting of ``package`` as `--help` shows it: what is typed, its default, and below what it means; by ``name``,
    where it is typed by another than its own."""
    kind = "|".join([*([_kind(option)] if option.takes_numbers or not option.words else []), *option.words])
    default = translated("unset") if option.default in (None, []) else _shown_default(option)
    return f"  --{name or option.name} {kind}  [{default}]\n      {translated(option.help, package)}"


def _shown_default(option: Option) -> str:
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)


def _kind(option: Option) -> str:
    if option.is_list and str not in option.kinds:
        return "A,B,…"
    return next(text for kind, text in ((int, "N"), (float, "X"), (str, "TEXT")) if kind in option.kinds)


def typed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were typed, checked."""
    declared = core_options()
    return {name: convert(declared[name], value) for name, value in values.items() if value is not None}


def lines_of_standard_input() -> Iterator[str]:
    """The lines of standard input, each with its end, in UTF-8 whatever the locale says. Raises :class:`UsageError`."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise UsageError(
                f"Standard input, line {number} is not UTF-8 text ({error.reason}); convert it."
            ) from error


def put_out(text: str, nl: bool = True) -> None:
    """Print what a model says to standard output: as it is for programs, harmless for a terminal."""
    # Without color=True, click takes out of what goes to a program whatever looks like a code for a terminal.
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=nl, color=True)


say = Printer("stderr")
"""What is not the result goes to standard error."""
print_line = Printer("stdout")
"""Prints a line of the result, in which there may be names of others."""
