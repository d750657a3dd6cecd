"""``sft plugins``: what is installed, read from metadata alone."""

from __future__ import annotations

import json

import click

from sft.plugins.discovery import REQUESTS, installed, strange_requests
from sft.plugins.requests import requests


@click.command(name="plugins")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def command(as_json: bool) -> None:
    """List the installed plugins. None of them is imported."""
    ways: dict[str, list[str]] = {}
    for kind in REQUESTS:
        for what, names in requests(kind).items():
            for name in names:
                ways.setdefault(name, []).append(f"{kind} {what}")
    strange = strange_requests()
    rows = [
        {
            "name": name,
            "distribution": item.distribution,
            "version": item.version,
            "also_requested_by": ways.get(name, []),
            "wrong_requests": strange.get(item.distribution, []),
        }
        for name, items in installed().items()
        for item in items
    ]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        click.echo("No plugin is installed; pip install 'paddle-sft[all]' brings those of the project.")
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        also = f"  (also requested by {', '.join(row['also_requested_by'])})" if row["also_requested_by"] else ""
        click.echo(f"{row['name']:<{width}}  {row['distribution']} {row['version']}{also}")
    for distribution, faults in strange.items():
        for fault in faults:
            click.echo(f"note: {distribution} declares {fault}")
