"""``sft certify NAME``: what a plugin must keep, beside all others, tried on tiny models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_path, complete_plugin
from sft.commands.shared import path_of


@click.command(name="certify")
@click.argument("name", shell_complete=complete_plugin)
@click.option("--check", "only", multiple=True, metavar="NAME", help="Try this check alone; repeatable.")
@click.option(
    "--try", "tried", multiple=True, metavar="OPTION=VALUE", help="A value for an option of the plugin; repeatable."
)
@click.option("--beside", multiple=True, metavar="PLUGIN", help="Another plugin; repeatable; unset: all others.")
@click.option("--first-failure", is_flag=True, help="End at the first case that fails.")
@click.option(
    "--json", "json_file", callback=path_of, shell_complete=complete_path, help="File for the report as JSON."
)
@click.option(
    "--html", "html_file", callback=path_of, shell_complete=complete_path, help="File for the report as a page."
)
def command(
    name: str,
    only: tuple[str, ...],
    tried: tuple[str, ...],
    beside: tuple[str, ...],
    first_failure: bool,
    json_file: str | None,
    html_file: str | None,
) -> None:
    """Certify a plugin: try on tiny models, on the CPU, what each plugin must keep.

    Alone and with its options changed, beside every other installed plugin, on each family of models, and on two
    processes: it learns, resumes to the bit, is read again and merged, keeps PEFT's layout, ignores no option, and
    leaves nothing behind. Exit code 0 if all that was tried holds, 1 if something fails.
    """
    from sft.certify.certify import certify
    from sft.certify.report import line, page
    from sft.errors import UsageError
    from sft.files import write_text

    values: dict[str, Any] = {}
    for text in tried:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--try {text} gives no value; write --try OPTION=VALUE.")
        values[key] = value
    report = certify(
        name,
        only=only,
        tried=values,
        beside=beside or None,
        first_failure=first_failure,
        say=lambda row: click.echo(line(row)),
    )
    click.echo(report.summary())
    if json_file:
        write_text(Path(json_file).expanduser(), report.as_json())
    if html_file:
        write_text(Path(html_file).expanduser(), page(report))
    if report.failures:
        sys.exit(1)
