"""Broken inputs, a table for each kind: what is wrong, and what ``sft`` must say of it.

Each ends in one sentence with exit code 2, without a traceback, with nothing written, and in a limited time and memory.
``python -m bad_inputs`` (in this folder's parent) shows what is said of each.
"""

from __future__ import annotations

from bad_inputs import (
    adapters,
    checkpoints,
    configs,
    data,
    looking,
    paths,
    plugins,
    settings,
    settings_files,
    tokenizers,
    weights,
)
from bad_inputs.case import Case

TABLES: dict[str, dict[str, Case]] = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (
        data,
        looking,
        settings_files,
        settings,
        configs,
        weights,
        tokenizers,
        adapters,
        checkpoints,
        plugins,
        paths,
    )
}


def counts() -> dict[str, int]:
    """How many broken inputs there are of each kind."""
    return {kind: len(cases) for kind, cases in TABLES.items()}
