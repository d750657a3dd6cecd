"""Writing a GGUF file: the header, and then the tensors, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import sft
from sft_export_gguf.families import arranged, describe, form_of, further_tensors
from sft_export_gguf.types import TYPES
from sft_export_gguf.vocabulary import describe_tokenizer

_OF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_KINDS = {name: gguf.GGMLQuantizationType[name.upper()] for name in TYPES}
_FILE_TYPES = {name: gguf.LlamaFileType[("ALL_" if name == "f32" else "MOSTLY_") + name.upper()] for name in _KINDS}


def write(path: Path, model: sft.FinishedModel, wanted: str | None) -> None:
    """Write ``model`` to ``path``, matrices in the type that is ``wanted`` (None: in the model's own); vectors are
    float32, as llama.cpp wants them. One tensor is in memory at a time."""
    form = form_of(model)
    found = model.architecture
    kind = wanted or _OF_DTYPES.get(model.dtype, "f32")
    writer = gguf.GGUFWriter(path, form.arch)
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(_FILE_TYPES[kind])
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(model, form, writer)
    describe_tokenizer(model, writer)

    names = gguf.get_tensor_name_map(_arch(form.arch), len(found.blocks))
    kinds: dict[str, Any] = {}
    for name in model.names:
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise sft.UsageError(f"GGUF has no name for tensor {name} of {form.arch}; write --to huggingface.")
        kinds[name] = _announce(writer, theirs, model.shape(name), kind)
    narrow = [name for name in model.names if kinds[name] is gguf.GGMLQuantizationType.F16 and kind.startswith("q")]
    if narrow:
        model.say(
            f"note: {len(narrow)} matrices are f16 and not {kind}, whose blocks of 32 values do not divide their rows "
            f"(such as {narrow[0]}, {list(model.shape(narrow[0]))})"
        )
    further = further_tensors(model)
    for name, array in further.items():
        _announce(writer, name, array.shape, "f32")

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in model.names:
        writer.write_tensor_data(_packed(name, arranged(name, model, form), kinds[name]))
    for array in further.values():
        writer.write_tensor_data(array)
    writer.close()


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, theirs in gguf.MODEL_ARCH_NAMES.items() if theirs == name)


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], wanted: str) -> gguf.GGMLQuantizationType:
    """Put a tensor into the header; the type that it will have."""
    kind = _KINDS[wanted]
    if len(shape) == 1:
        kind = gguf.GGMLQuantizationType.F32
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
    return kind


def _packed(name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor in the bytes of ``kind``; :class:`sft.UsageError` where its values do not fit."""
    plain = np.ascontiguousarray(array.astype(np.float32, copy=False))
    with np.errstate(over="ignore"):  # it is an error below
        packed = gguf.quants.quantize(plain, kind)
    if kind is gguf.GGMLQuantizationType.F16 and not np.isfinite(packed).all() and np.isfinite(plain).all():
        raise sft.UsageError(
            f"Tensor {name} has values up to {np.abs(plain).max():.3g}, which float16 does not hold; give --gguf_type "
            "bf16 or f32."
        )
    return np.ascontiguousarray(packed)
