"""Commands that answer or measure, typed in the process of the test."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click.testing
import pytest

Type = Callable[..., click.testing.Result]
MODEL = "llama-tied-gqa"


@pytest.fixture
def typed(paddle: Any, models: Path) -> Type:
    """``sft COMMAND --model_name_or_path (the tiny model) ...`` in this process; errors are raised."""

    def run(name: str, *arguments: str, lines: str | None = None) -> click.testing.Result:
        command = import_module(f"sft.commands.{name}").command
        line = ["--model_name_or_path", str(models / MODEL), *arguments]
        return click.testing.CliRunner().invoke(
            command, line, input=lines, standalone_mode=False, catch_exceptions=False
        )

    return run
