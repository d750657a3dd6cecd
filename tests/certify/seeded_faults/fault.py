"""What a fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``edits`` are texts of ``module`` (a file of the distribution's package) and what stands there instead."""

    name: str
    plugin: str
    module: str
    edits: tuple[tuple[str, str], ...]
    wrong: str


def fault(name: str, plugin: str, module: str, wrong: str, *edits: tuple[str, str]) -> Fault:
    return Fault(name, plugin, module, edits, wrong)
