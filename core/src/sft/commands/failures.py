"""How the command line says why it could not do what was asked (docs/exit-codes.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from sft.errors import UsageError
from sft.foreign_text import safe
from sft.options import convert
from sft.settings.arguments import core_options
from sft.voice import Printer, event_line


class Failures:
    """Says one sentence on standard error; and as an event, where what is done is logged as JSON."""

    def __init__(self) -> None:
        self._stream: str | None = None

    def follow(self, values: Mapping[str, Any]) -> None:
        """From now on failures are those of a run with these settings, which need not be right."""
        try:
            asked = convert(core_options()["json_logs"], values.get("json_logs", False))
        except UsageError:  # which the run is going to say
            return
        self._stream = None if not asked else "stderr" if asked == "stderr" else "stdout"

    def tell(self, message: str, code: int, details: str = "") -> int:
        """Say the ``message``, below the ``details`` of many lines if there are any; the exit ``code``."""
        text = safe(" ".join(message.split()))
        if self._stream is not None:
            values = {"text": text, "exit_code": code, **({"details": safe(details)} if details else {})}
            Printer(self._stream).write(event_line("error", values, "error"))
        if self._stream != "stderr":
            click.echo(safe(details), err=True, nl=False)
            click.echo(f"sft: {text}", err=True)
        return code


def following(values: Mapping[str, Any]) -> None:
    """Let failures of the command that has been typed be told as the settings ``values`` of its run ask."""
    failures = click.get_current_context().find_object(Failures)
    if failures is not None:
        failures.follow(values)
