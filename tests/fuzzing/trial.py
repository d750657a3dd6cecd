"""Trying what is made up: a target, and what must hold of each of its examples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from reliability.figures import WHOLE

import sft

FEW, MANY = 10, 10_000 if WHOLE else 300
"""Examples of each target: by default, and in the slow tier."""
SECONDS = 10.0
"""The longest that an example may take; a machine with other work to do is not to fail for it."""
LONGEST = 3000
"""Characters of a message, at most."""


@dataclass(frozen=True)
class Target:
    """A reader: ``read`` gets a folder that :meth:`prepare` has filled, and an example."""

    examples: Any
    read: Callable[[Path, Any], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    kept: tuple[Any, ...] = field(default_factory=tuple)


def fuzz(target: Target, count: int) -> int:
    """Try ``count`` examples, and those that are kept; how many have been tried."""
    tried = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.prepare(folder)

        @settings(
            max_examples=count,
            derandomize=not WHOLE,
            print_blob=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.examples)
        def check(made_up: Any) -> None:
            nonlocal tried
            tried += 1
            attempt(target, folder, made_up)

        for one in target.kept:
            check = example(one)(check)
        check()
    return tried


def attempt(target: Target, folder: Path, made_up: Any) -> None:
    """What must hold of each example."""
    began = time.monotonic()
    try:
        target.read(folder, made_up)
    except sft.UsageError as error:
        message = str(error)
        assert message, "it is refused without a word"
        assert "\n" not in message, message
        assert len(message) < LONGEST, message[:500]
    assert time.monotonic() - began < SECONDS
