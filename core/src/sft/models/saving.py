"""Writing model directories: streamed, sharded, in Hugging Face's layout or PaddleNLP's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft.data.tokenizer import Tokenizer
from sft.files import write_json
from sft.models.config import hf_config
from sft.models.finished import FinishedModel
from sft.models.loading import ModelSource
from sft.models.shards import WeightFormat, write_tensors
from sft.models.stacked import stacked
from sft.progress import Progress


def model_tensors(parameters: Iterable[tuple[str, Any]], source: ModelSource) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters in Hugging Face names and layout, in their dtype, one at a time; tied ones once, and experts stacked
    where the source's files have them so."""
    import ml_dtypes

    def upright() -> Iterator[tuple[str, np.ndarray]]:
        for name, parameter in parameters:
            array = parameter.numpy()
            if array.dtype == np.uint16:  # paddle's way of giving bfloat16 to numpy
                array = array.view(ml_dtypes.bfloat16)
            if source.family.is_transposed(name, array.ndim):
                array = np.ascontiguousarray(array.T)
            yield name, array

    for name, array in stacked(upright(), source.parts):
        yield source.to_file(name), array


def write_model(folder: Path, parameters: Iterable[tuple[str, Any]], source: ModelSource, tokenizer: Tokenizer) -> None:
    """A whole model, of whole ``parameters`` by structured name, with config and tokenizer."""
    dtypes: list[str] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in model_tensors(parameters, source):
            dtypes.append(str(array.dtype))
            yield name, array

    write_tensors(folder, tensors())
    _write_settings(folder, source, tokenizer, dtypes[0])


def write_finished(
    folder: Path, model: FinishedModel, form: WeightFormat | None = None, progress: Progress | None = None
) -> None:
    """The tensors of ``model``, streamed, with config and tokenizer; ``folder`` is there and empty."""
    form, progress = form or WeightFormat(), progress or Progress(lambda text: None)
    source = model.source

    def laid_out() -> Iterator[tuple[str, np.ndarray]]:
        for name in progress.over(model.names, "writing", "tensors"):
            weight = model.read(name)
            if form.layout == "paddle" and source.family.is_transposed(name, weight.ndim):
                weight = np.ascontiguousarray(weight.T)
            yield name, weight

    tensors = stacked(laid_out(), source.parts if form.layout == "hf" else {})
    write_tensors(folder, ((source.to_file(name, form.layout), tensor) for name, tensor in tensors), form)
    model.check_adapter()
    _write_settings(folder, source, model.tokenizer, model.dtype, form.layout)


def _write_settings(folder: Path, source: ModelSource, tokenizer: Tokenizer, dtype: str, layout: str = "hf") -> None:
    values = hf_config(source.values, dtype, source.family)
    if layout == "paddle":
        values["dtype"] = dtype
        scaling = values.get("rope_scaling") or {}
        if scaling.get("rope_type") == "linear":  # PaddleNLP's own spelling, the only one that it computes
            values.update(rope_scaling_type="linear", rope_scaling_factor=scaling["factor"])
    write_json(folder / "config.json", values)
    if source.generation is not None:
        (folder / "generation_config.json").write_bytes(source.generation)
    tokenizer.save(folder)
