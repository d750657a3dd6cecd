"""Writing model directories in Hugging Face layout: streamed, sharded, readable by transformers and PaddleNLP."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.tokenizer import Tokenizer
from sft.errors import UsageError
from sft.files import staged_folder, write_json
from sft.models.config import hf_config
from sft.models.loading import ModelSource
from sft.models.source import Weights

if TYPE_CHECKING:
    import numpy as np

    from sft.seams import AdapterMerger, Quantizer

SHARD_BYTES = 2 << 30


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> int:
    """Stream ``tensors`` (Hugging Face names and layout) into safetensors files; returns the bytes of weights.

    One file is ``model.safetensors``; more get numbers and an index. At most one shard is in memory.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    from safetensors.numpy import save_file

    parts: list[dict[str, int]] = []
    shard: dict[str, np.ndarray] = {}

    def part(number: int) -> Path:
        return folder / f"part-{number:05d}.safetensors"

    def flush() -> None:
        if shard:
            save_file(shard, str(part(len(parts))), metadata={"format": "pt"})
            parts.append({name: tensor.nbytes for name, tensor in shard.items()})
            shard.clear()

    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    total = sum(sum(sizes.values()) for sizes in parts)
    if len(parts) == 1:
        part(0).rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for number, sizes in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        part(number).rename(folder / name)
        weight_map.update(dict.fromkeys(sizes, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def model_tensors(model: Any, source: ModelSource) -> Iterable[tuple[str, np.ndarray]]:
    """The parameters of ``model`` in Hugging Face names and layout, in their dtype, one at a time; tied ones once."""
    import ml_dtypes
    import numpy as np

    for name, parameter in model.named_parameters():
        array = parameter.numpy()
        if array.dtype == np.uint16:  # paddle's way of giving bfloat16 to numpy
            array = array.view(ml_dtypes.bfloat16)
        if source.family.is_transposed(name, array.ndim):
            array = np.ascontiguousarray(array.T)
        yield source.family.to_hf(name), array


def write_model(folder: Path, model: Any, source: ModelSource, tokenizer: Tokenizer) -> None:
    """A whole model with config and tokenizer."""
    write_tensors(folder, model_tensors(model, source))
    dtype = str(next(iter(model.parameters())).dtype).rpartition(".")[2]
    _write_settings(folder, source, tokenizer, dtype)


def write_merged(
    folder: Path,
    source: ModelSource,
    merger: AdapterMerger,
    tokenizer: Tokenizer,
    quantizer: Quantizer | None = None,
) -> int:
    """``source``'s weights with an adapter folded in, tensor by tensor: float32 arithmetic, the base's dtype.

    With a ``quantizer`` the Linears of the blocks are quantized and read back first, and all is written in float32.
    The folder appears complete under its name or not at all. Returns the number of tensors that changed.
    """
    import numpy as np

    weights = Weights(source.folder, source.family)
    changed = 0
    dtypes: set[str] = set()

    def merged() -> Iterable[tuple[str, np.ndarray]]:
        nonlocal changed
        for original in weights:
            if original.endswith("rotary_emb.inv_freq"):
                continue
            if original == "lm_head.weight" and source.config.tie_word_embeddings:
                continue  # some writers store the tied matrix twice
            stored = weights.read_stored(original)
            name = original if weights.layout == "hf" else source.family.to_hf(original)
            if weights.layout == "paddle" and source.family.is_transposed(original, stored.ndim):
                stored = np.ascontiguousarray(stored.T)
            dtypes.add("float32" if quantizer is not None else str(stored.dtype))
            base = stored.astype(np.float32)
            if quantizer is not None and base.ndim == 2 and ".layers." in name:
                layer = quantizer.quantize(name.removesuffix(".weight"), np.ascontiguousarray(base.T), None)
                base = base if layer is None else layer.dequantize().numpy().T
            weight = merger.merge(name, base)
            changed += int(not np.array_equal(weight, base))
            yield name, np.ascontiguousarray(weight.astype(np.float32 if quantizer is not None else stored.dtype))

    with staged_folder(folder) as staging:
        write_tensors(staging, merged())
        if merger.unused():
            shown = ", ".join(merger.unused()[:3])
            raise UsageError(
                f"The adapter has weights that {source.folder} has no place for ({shown}); it belongs to another model."
            )
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
        _write_settings(staging, source, tokenizer, dtype)
    return changed


def _write_settings(folder: Path, source: ModelSource, tokenizer: Tokenizer, dtype: str) -> None:
    write_json(folder / "config.json", hf_config(source.values, dtype))
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    tokenizer.save(folder)
