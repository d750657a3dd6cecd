"""Writing model directories: streamed, sharded, in Hugging Face's layout or PaddleNLP's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.files import staged_folder, write_json
from sft.models.config import hf_config
from sft.models.layers import target_layers
from sft.models.loading import ModelSource, build_model
from sft.models.shards import WeightFormat, write_tensors
from sft.models.stacked import stacked
from sft.progress import Progress

if TYPE_CHECKING:
    from sft.seams import AdapterMerger, Quantizer


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


def write_merged(
    folder: Path,
    source: ModelSource,
    merger: AdapterMerger,
    tokenizer: Tokenizer,
    quantizer: Quantizer | None = None,
    form: WeightFormat | None = None,
    progress: Progress | None = None,
) -> int:
    """``source``'s weights with an adapter folded in, tensor by tensor: float32 arithmetic, ``form``'s dtype.

    With a ``quantizer`` the Linears that it stands for in a run are quantized and read back first, and all is written
    in float32.
    The folder appears complete under its name or not at all. Returns the number of tensors that changed.
    """
    form, progress = form or WeightFormat(), progress or Progress(lambda text: None)
    weights = source.weights()
    quantized = set() if quantizer is None else {layer.name for layer in target_layers(build_model(source))}
    changed = 0
    dtypes: set[str] = set()

    def merged() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal changed
        for original in progress.over(list(weights), "merging", "tensors"):
            stored = weights.read_stored(original)
            name = source.family.from_file(original, weights.layout)
            if weights.layout == "paddle" and source.family.is_transposed(name, stored.ndim):
                stored = stored.T
            weight, is_new = _merge_one(name, stored, merger, quantizer, name.removesuffix(".weight") in quantized)
            if quantizer is None and form.dtype == "base":
                with np.errstate(over="ignore"):  # it is an error below
                    weight = weight.astype(stored.dtype, copy=False)
            elif form.dtype == "float32":
                weight = weight.astype(np.float32, copy=False)
            if weight is not stored:
                _check_finite(name, stored, weight)
            changed += is_new
            dtypes.add(str(weight.dtype))
            if form.layout == "paddle" and source.family.is_transposed(name, weight.ndim):
                weight = weight.T
            yield name, np.ascontiguousarray(weight)

    with staged_folder(folder) as staging:
        tensors = stacked(merged(), source.parts if form.layout == "hf" else {})
        write_tensors(staging, ((source.to_file(name, form.layout), tensor) for name, tensor in tensors), form)
        if merger.unused():
            shown = ", ".join(merger.unused()[:3])
            raise UsageError(
                f"The adapter has weights that {source.folder} has no place for ({shown}); it belongs to another model."
            )
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
        _write_settings(staging, source, tokenizer, dtype, form.layout)
    return changed


def _merge_one(
    name: str, stored: np.ndarray, merger: AdapterMerger, quantizer: Quantizer | None, quantized: bool
) -> tuple[np.ndarray, bool]:
    """One tensor [out, in], in float32 if the adapter or the quantizer changed it, and whether the adapter did."""
    import paddle

    base = paddle.to_tensor(np.ascontiguousarray(stored.astype(np.float32, copy=False)))
    if quantizer is not None and quantized:
        weight = np.ascontiguousarray(stored.astype(np.float32, copy=False).T)
        layer = quantizer.quantize(name.removesuffix(".weight"), weight, None)
        base = base if layer is None else layer.dequantize().T
    weight = merger.merge(name, base)
    if weight is base and quantizer is None:
        return stored, False
    array = weight.numpy()
    is_new = weight is not base and not np.array_equal(array, base.numpy())
    return array, is_new


def _check_finite(name: str, stored: np.ndarray, weight: np.ndarray) -> None:
    """Refuse a ``weight`` to be written that is not finite where the base's, as ``stored``, is."""
    if np.isfinite(weight).all() or not (np.isfinite(stored) & ~np.isfinite(weight)).any():
        return
    if weight.dtype == np.float32:
        raise UsageError(f"With the adapter, {name} would not be finite; the adapter is damaged: copy it again.")
    raise UsageError(
        f"With the adapter, {name} has values that do not fit into {weight.dtype}, the base's; add --dtype float32."
    )


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
