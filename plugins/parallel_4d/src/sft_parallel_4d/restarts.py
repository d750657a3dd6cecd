"""What a run that goes on without lost ranks knows and says of that; ranks need not know how the plan was chosen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_parallel_4d.environment import FOLDER
from sft_parallel_4d.plans import Plan

RESTARTS = "restarts.json"
"""The file with what the run is to remember of earlier launches, which have lost ranks."""


def restarts_before() -> list[dict[str, Any]]:
    """What the process that started this rank knows of earlier losses in this launch, oldest first."""
    path = Path(os.environ[FOLDER]) / RESTARTS if FOLDER in os.environ else None
    return list(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.exists() else []


def line_of(event: Mapping[str, Any]) -> str:
    """What a user is told of a restart, in one line."""
    ranks = ", ".join(map(str, event["lost"]))
    old, new = (Plan(**event[name]) for name in ("old_plan", "new_plan"))
    left_out = event["left_out"]
    idle = f" ({left_out} left out: the plan has no use for {'it' if left_out == 1 else 'them'})"
    same, close, other = (", ".join(event[name]) for name in ("same_to_the_bit", "the_same_to_1e-5", "not_the_same"))
    return (
        f"went on without rank{'s' if len(event['lost']) > 1 else ''} {ranks} of {event['of']}, lost at {event['at']}, "
        f"from step {event['from_step']} with {event['rows_per_step']} rows a step: {new} instead of "
        f"{old}{idle if left_out else ''}. To the bit: {same}. Nearly: {close}. Not: {other}"
    )
