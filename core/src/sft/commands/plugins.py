"""``sft plugins``: what is installed, what one plugin declares, whether that holds, and a new one to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sft.commands.completing import complete_plugin
from sft.commands.shared import option_row, print_line
from sft.errors import SftError
from sft.facts import columns, padded
from sft.kit.about import About, about, all_plugins, find_plugin, found, ties
from sft.kit.new import KINDS, write_package
from sft.language import translated
from sft.plugins.api import API_VERSION
from sft.plugins.discovery import ALL_OF_PROJECT, canonical, installed, left_out, strange_requests
from sft.small_files import check_path


@click.group(name="plugins", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the installed plugins: what each is, needs and excludes. One that is broken is listed with the reason.

    `sft plugins info NAME` says everything of one, `sft plugins validate` whether what a plugin declares holds, and
    `sft plugins new NAME --kind KIND` writes one to begin with.
    """
    if context.invoked_subcommand is not None:
        return
    rows = all_plugins(shapes=as_json)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row.as_dict()))
        return
    if not rows:
        click.echo(f"No plugin is installed; {left_out() or ALL_OF_PROJECT}.")
        return
    names, kinds = (max(map(columns, each)) for each in ([row.name for row in rows], [_kind(row) for row in rows]))
    for row in rows:
        print_line(f"{padded(row.name, names)}  {padded(_kind(row), kinds)}  {row.origin}")
        for line in _more(row):
            print_line(f"{'':<{names}}  {line}")
    for distribution, faults in strange_requests().items():
        for fault in faults:
            print_line(f"note: {distribution} declares {fault}")
    for tie in ties(rows):
        print_line(f"note: {tie}")


def _kind(row: About) -> str:
    return "broken" if row.fault else ", ".join(row.kinds)


def _more(row: About) -> list[str]:
    if row.fault:
        return [row.fault]
    relations = [
        f"{word} {', '.join(names)}"
        for word, names in (("needs", row.requires), ("not with", row.conflicts), ("replaces", row.supersedes))
        if names
    ]
    also = [f"also requested by {', '.join(row.also_requested_by)}"] if row.also_requested_by else []
    return [line for line in (translated(row.summary, row.package), "; ".join([*relations, *also])) if line]


@command.command(name="info")
@click.argument("name", shell_complete=complete_plugin)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def info(name: str, as_json: bool) -> None:
    """Everything that plugin NAME declares. NAME may be the path of a file, ./my_plugin.py."""
    row = about(find_plugin(name), found())
    if as_json:
        click.echo(json.dumps(row.as_dict()))
        return
    for line in _page(row):
        print_line(line)


def _page(row: About) -> list[str]:
    if row.fault:
        return [f"{row.name}: broken ({row.origin})", f"  {row.fault}"]
    shapes = {
        True: "yes: a checkpoint is resumed with it, and with the same options",
        False: "no: it may come and go",
        None: "unknown, for what it needs is not here",
    }
    fields: dict[str, Any] = {
        "reference": row.reference,
        "API": f"{row.api_version} (this sft has {API_VERSION})",
        "asked for by": ", ".join([f"--plugin {row.name}", *row.also_requested_by]),
        "needs": ", ".join(row.requires),
        "not with": ", ".join(row.conflicts),
        "replaces": ", ".join(row.supersedes),
        "shapes what is learned": shapes[row.shapes],
        "implements": ", ".join(row.hooks),
        "publishes": ", ".join(row.publishes),
    }
    lines = [f"{row.name}: {_kind(row)} ({row.origin})", f"  {translated(row.summary, row.package)}", ""]
    lines += [f"  {word:<22}  {value}" for word, value in fields.items() if value]
    if row.options:
        shown = [line for one in row.options for line in option_row(one, package=row.package).split("\n")]
        lines += ["", f"  {translated('Settings')}:", *(f"  {line}" for line in shown)]
    return lines


@command.command(name="validate")
@click.argument("name", required=False, shell_complete=complete_plugin)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def validate(context: click.Context, name: str | None, as_json: bool) -> None:
    """Check what plugin NAME declares (or all that are installed): its entry point, the range of APIs, its options
    against all others, hooks and their arguments, how long its import takes, and what it says of itself.

    NAME may be the path of a file, ./my_plugin.py. Exit code 1 says that something is wrong.
    """
    from sft.kit.validate import validated

    findings = [one for each in ([name] if name is not None else installed()) for one in validated(each)]
    for one in findings:
        if as_json:
            click.echo(json.dumps(one.as_dict()))
            continue
        state = "valid" if not one.faults else f"{len(one.faults)} fault{'s' * (len(one.faults) > 1)}"
        print_line(f"{one.name} ({one.origin}): {state}")
        for word, rows in (("fault", one.faults), ("note", one.notes)):
            for check, text in rows:
                print_line(f"  {word}, {check}: {text}")
    if not findings and not as_json:
        click.echo("No plugin is installed, so there is nothing to check.")
    wrong = [one.name for one in findings if one.faults]
    if wrong:
        raise SftError(f"{', '.join(wrong)}: something is wrong, see above.")


@command.command(name="new")
@click.argument("name")
@click.argument("folder", required=False, metavar="[DIR]")
@click.option("--kind", required=True, type=click.Choice(list(KINDS)), help="What it is.")
def new(name: str, folder: str | None, kind: str) -> None:
    """Write a package for a new plugin NAME into DIR (by default sft-NAME): a small technique of its kind that
    installs, validates and passes its tests as it is.
    """
    named = canonical(name)
    if folder is not None:
        check_path("DIR", folder)
    target = write_package(named, kind, None if folder is None else Path(folder).expanduser())
    print_line(f"written to {target}: {KINDS[kind].summary}")
    print_line(f"next: pip install -e '{target}[test]', sft plugins validate {named}, pytest {target}")
