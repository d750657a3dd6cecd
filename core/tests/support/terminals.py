"""A terminal that is none, and a clock that stands still."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what is written."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Terminal]:
    """Makes standard output a terminal of so many columns; in the test itself, because pytest replaces it after the
    fixtures."""

    def make(columns: int = 100, **environment: str) -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        for name, value in {"TERM": "xterm", "COLUMNS": str(columns), **environment}.items():
            monkeypatch.setenv(name, value)
        return stream

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is put forward."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward
