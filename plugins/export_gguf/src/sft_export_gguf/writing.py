"""Writing a GGUF file: the header, and then the tensors, one at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np

import sft
from sft_export_gguf.families import Form, arranged, describe, form_of, further_tensors
from sft_export_gguf.types import TYPES
from sft_export_gguf.vocabulary import describe_tokenizer

_OF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
KINDS = {name: gguf.GGMLQuantizationType[name.upper()] for name in TYPES}
FILE_TYPES = {name: gguf.LlamaFileType[("ALL_" if name == "f32" else "MOSTLY_") + name.upper()] for name in KINDS}
_OF_AN_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+)\.weight")
_ROUTER = re.compile(r".+\.mlp\.(gate|shared_expert_gate)\.weight")


@dataclass
class _Written:
    """A tensor of the file: the model's tensors ``names`` (of experts one of each, which lie one over the other), its
    ``shape``, and the type that it has."""

    names: list[str]
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType


def write(path: Path, model: sft.FinishedModel, wanted: str | None) -> None:
    """Write ``model`` to ``path``, matrices in the type that is ``wanted`` (None: in the model's own); vectors and what
    routes tokens to experts are float32, as llama.cpp wants them. One tensor is in memory at a time, of experts those
    of one kind in one block."""
    form = form_of(model)
    kind = wanted or _OF_DTYPES.get(model.dtype, "f32")
    writer = gguf.GGUFWriter(path, form.arch)
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(FILE_TYPES[kind])
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(model, form, writer)
    describe_tokenizer(model, writer)

    tensors: dict[str, _Written] = {}
    for name, names in _together(model).items():
        shape = model.shape(names[0])
        if _ROUTER.fullmatch(name) and shape[0] == 1:
            shape = shape[1:]  # a weight a value, for the expert that every token goes through
        shape = shape if len(names) == 1 else (len(names), *shape)
        own = "f32" if _ROUTER.fullmatch(name) else kind
        theirs = called(name, form, model)
        tensors[theirs] = _Written(names, shape, announce(writer, theirs, shape, own))
    f16 = gguf.GGMLQuantizationType.F16
    narrow = [one for one in tensors.values() if one.kind is f16 and kind.startswith("q")]
    if narrow:
        model.say(
            f"note: {len(narrow)} matrices are f16 and not {kind}, whose blocks of 32 values do not divide their rows "
            f"(such as {narrow[0].names[0]}, {list(model.shape(narrow[0].names[0]))})"
        )
    further = further_tensors(model)
    for name, array in further.items():
        announce(writer, name, array.shape, "f32")

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in tensors.values():
        arrays = [arranged(name, model, form) for name in one.names]
        whole = arrays[0].reshape(one.shape) if len(arrays) == 1 else np.stack(arrays)
        writer.write_tensor_data(packed(one.names[0], whole, one.kind))
    for array in further.values():
        writer.write_tensor_data(array)
    writer.close()


def _together(model: sft.FinishedModel) -> dict[str, list[str]]:
    """The tensors of the model that are one of the file, by a name for it."""
    found: dict[str, list[str]] = {}
    for name in model.names:
        match = _OF_AN_EXPERT.fullmatch(name)
        found.setdefault(name if match is None else f"{match[1]}.{match[2]}.weight", []).append(name)
    for names in found.values():
        names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
    return found


def called(name: str, form: Form, model: sft.FinishedModel) -> str:
    """What GGUF calls the tensor ``name``."""
    theirs = _names(form.arch, len(model.architecture.blocks)).get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise sft.UsageError(f"GGUF has no name for tensor {name} of {form.arch}; write --to huggingface.")
    return str(theirs)


@cache
def _names(arch: str, blocks: int) -> gguf.TensorNameMap:
    known = {theirs: one for one, theirs in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[arch], blocks)


def announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], wanted: str) -> gguf.GGMLQuantizationType:
    """Put a tensor into the header; the type that it will have."""
    kind = KINDS[wanted]
    if len(shape) == 1:
        kind = gguf.GGMLQuantizationType.F32
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
    return kind


def packed(name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor in the bytes of ``kind``; :class:`sft.UsageError` where its values do not fit."""
    plain = np.ascontiguousarray(array.astype(np.float32, copy=False))
    with np.errstate(over="ignore"):  # it is an error below
        found = gguf.quants.quantize(plain, kind)
    if kind is gguf.GGMLQuantizationType.F16 and not np.isfinite(found).all() and np.isfinite(plain).all():
        raise sft.UsageError(
            f"Tensor {name} has values up to {np.abs(plain).max():.3g}, which float16 does not hold; give --gguf_type "
            "bf16 or f32."
        )
    return np.ascontiguousarray(found)
