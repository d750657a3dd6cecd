"""Writing an adapter alone as a GGUF file, which llama.cpp puts over a model of the same base (``--lora``)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

import sft
from sft_export_gguf.families import form_of, turned_as
from sft_export_gguf.writing import FILE_TYPES, announce, called, packed

_EMBEDDING = "model.embed_tokens"
TYPES = ("f32", "f16", "bf16")
"""Those of numbers of an adapter, whose ranks blocks of 32 values seldom divide."""


def write_adapter(path: Path, model: sft.FinishedModel, wanted: str | None) -> None:
    """Write the adapter of ``model`` to ``path``, its matrices in the type that is ``wanted`` (None: f32). Scalings are
    in B, so the file's own α is 0, by which llama.cpp multiplies nothing."""
    kind = wanted or "f32"
    if kind not in TYPES:
        raise sft.UsageError(f"gguf_type {kind} is none of an adapter alone; give one of {', '.join(TYPES)}.")
    form, updates = form_of(model), model.updates()
    stacked = next((name for name in updates if ".experts." in name), None)
    if stacked is not None:
        raise sft.UsageError(
            f"The adapter changes experts ({stacked}), of which a GGUF file has one tensor for all; fold it in "
            "with --to gguf."
        )
    if model.architecture.tied and _EMBEDDING in updates:
        raise sft.UsageError(
            "The adapter changes an embedding that is lm_head too, which llama.cpp does not do with one update; fold "
            "it in with --to gguf."
        )
    writer = gguf.GGUFWriter(path, form.arch)
    writer.add_type("adapter")
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    tensors = {}
    for name, (a, b) in updates.items():
        theirs = called(f"{name}.weight", form, model)
        # llama.cpp looks rows of an embedding's A up, and multiplies with all others.
        first = a if name == _EMBEDDING else a.T
        second = turned_as(form, f"{name}.weight", np.ascontiguousarray(b.T), model)
        for end, array in ((".lora_a", first), (".lora_b", second)):
            tensors[theirs + end] = array, announce(writer, theirs + end, array.shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (array, found) in tensors.items():
        writer.write_tensor_data(packed(name, array, found))
    writer.close()
