"""A base written with something folded in, as ``sft merge`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.data.tokenizer import Tokenizer
from sft.files import staged_folder
from sft.models.loading import ModelSource
from sft.models.shards import WeightFormat


def write_merged(
    folder: Path,
    source: ModelSource,
    merger: Any,
    tokenizer: Tokenizer,
    quantizer: Any = None,
    form: WeightFormat | None = None,
) -> int:
    """How many of ``source``'s tensors ``merger`` has changed in what is written to ``folder``."""
    from sft.models.finished import FinishedModel
    from sft.models.saving import write_finished

    model = FinishedModel(source, tokenizer, merger, quantizer, (form or WeightFormat()).dtype)
    with staged_folder(folder) as staging:
        write_finished(staging, model, form)
    return model.changed
