"""Plugin ``data-hub``: data sets of the Hugging Face hub, and folders with their layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sft

if TYPE_CHECKING:
    from sft import Run


class DataHub(sft.Plugin):
    """Opens ``hf://owner/name``: the library ``datasets`` fetches and reads it, once for all runs."""

    name = "data-hub"
    api_version = ">=1.1,<2"
    summary = "Data sets of the hub by name, or of a folder with its layout (hf://)."
    reference = "Lhoest et al. 2021, Datasets (arXiv 2109.02846)"

    @sft.hookimpl
    def sft_data_source(self, run: Run, name: str, split: str) -> list[Path] | None:
        if not name.startswith("hf://"):
            return None
        from sft_data_hub.opening import Named, open_split

        return open_split(Named.of(name), split, run.say)
