"""The result of a run, which a user loads afterwards: the adapter, or the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.tokenizer import FILES as TOKENIZER_FILES
from sft.files import save_tensors, write_json
from sft.models.adapter_folder import as_in_files, base_metadata

if TYPE_CHECKING:
    import numpy as np

    from sft.context import CoreRun

RESULT_KEYS = ("adapter_config.json", "config.json", "model.safetensors.index.json")
"""The files with which readers of an adapter or a model begin; the first ones with the first."""
PUBLISHED = (
    *RESULT_KEYS,
    *("adapter_model.safetensors", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *TOKENIZER_FILES,
)
"""The files of a result."""


def write_result(run: CoreRun, folder: Path | None) -> dict[str, np.ndarray]:
    """Write the adapter in PEFT layout, or the whole model, and the tokenizer to ``folder``. Returns the adapter's
    tensors, by their names in its file.

    All processes of a run call this. The main one gives a folder and writes; the others give None and only take part.
    """
    from sft.models.rows_in_files import with_rows
    from sft.models.saved_layers import saved_tensors, with_saved
    from sft.models.saving import write_model
    from sft.models.token_rows import rows_of

    if not run.exports_adapter:
        parameters = list(run.strategy.parameters(run.model))
        whole = run.progress.over(run.strategy.whole(parameters), "writing weights", "tensors", len(parameters))
        try:
            if folder is not None:
                write_model(folder, whole, run.source, run.tokenizer)
        finally:
            for _ in whole:  # where the disk is full, the other processes still wait for this one
                pass
        return {}
    saved, rows = saved_tensors(run), rows_of(run)
    with run.strategy.assembled(run.model):
        if folder is None:
            return {}
        files = as_in_files(run.hook.sft_export_adapter(run=run, model=run.model), run.source.family)
        files = with_rows(with_saved(files, saved, run.source.architecture.tied), rows)
        write_json(folder / "adapter_config.json", files.config)
        base = base_metadata(run.base_fingerprint, run.source, run.plugins, run.settings.options)
        save_tensors(folder / "adapter_model.safetensors", files.tensors, {"format": "pt", **base})
        run.tokenizer.save(folder)
        return dict(files.tensors)
