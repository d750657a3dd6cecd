"""The hook by which plugins tell ``sft plan`` what they do to a model.

Implement it with ``@sft.hookimpl(optionalhook=True)``: the plugin then works where this one is not installed, and needs
to import nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sft

if TYPE_CHECKING:
    from sft_parallel_4d.outline import Outline


@sft.hookspec
def parallel_outline(outline: Outline, hook: Any) -> None:
    """Change the model on paper as this plugin changes the real one: tensors that it adds, freezes or replaces, and
    what it keeps for backward. Called to plan a run, of whose model only ``config.json`` has been read.

    ``hook`` calls hooks, also those that the plugin publishes for its refinements, as ``run.hook`` does in a run."""
