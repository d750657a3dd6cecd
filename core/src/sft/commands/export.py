"""``sft export``: a finished model in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_path
from sft.commands.shared import MODEL, TEMPLATE, adapter_names, path_of, print_line, setting_options, typed_values
from sft.commands.typed import named_values
from sft.errors import UsageError


@click.command(name="export", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    *MODEL,
    required=True,
    shell_complete=complete_path,
    help="The model: a directory, a weight file in one, or a hub name.",
)
@setting_options("allow_pickle", "device", "chat_template", chat_template=TEMPLATE)
@click.option(
    *adapter_names(), callback=path_of, shell_complete=complete_path,
    help="An adapter to fold in: the folder that a run wrote, or any PEFT adapter.",
)  # fmt: skip
@click.option("--to", required=True, metavar="FORM", help="huggingface, or a form that a plugin writes.")
@click.option(
    "--output_path", "--output-path", "--output_dir", "--output-dir", "output", required=True, callback=path_of,
    shell_complete=complete_path, help="The folder that is written; must be new or empty.",
)  # fmt: skip
@click.pass_context
def command(context: click.Context, model: str, adapter: str | None, to: str, output: str, **settings: Any) -> None:
    """Write a finished model, with its adapter folded in, in another form.

    Tensors are streamed, as in sft merge. Options of the plugin that writes the form are given as --name value
    (`sft plugins info NAME` lists them); --plugin NAME asks for others, such as a quantizer where the adapter does not
    name it.
    """
    from sft.inference.export import export
    from sft.voice import Printer

    loose, options, plugins = named_values(context.args)
    if loose:
        raise UsageError(f"Unexpected {loose[0]!r}; options are given as --name value.")
    written = export(
        model,
        Path(adapter) if adapter else None,
        to.strip().lower(),
        Path(output).expanduser(),
        Printer("stdout"),
        plugins,
        typed_values(settings),
        options,
    )
    for path in written:
        print_line(f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MiB)" if path.is_file() else f"wrote {path}")
