"""Broken weights: indexes, pickles, safetensors files, and tensors that hold no finite real numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from bad_inputs.case import (
    LORA,
    Case,
    Change,
    directory,
    each,
    edit,
    link,
    mode,
    nested,
    of_tensors,
    pipe,
    remove,
    socket,
    write,
)

WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
NORM = "model.norm.weight"


def index(says: str, weight_map: Any, *more: Change) -> Case:
    return Case(says, (write(INDEX, json.dumps({"weight_map": weight_map})), *more))


def weights(says: str, make: Callable[[bytes], bytes]) -> Case:
    return Case(says, (edit(WEIGHTS, make),))


def tensors(says: str, make: Callable[..., Any]) -> Case:
    return Case(says, (of_tensors(WEIGHTS, make),))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The header of a safetensors file is changed; what ``change`` returns is written as JSON."""

    def make(old: bytes) -> bytes:
        size = struct.unpack("<Q", old[:8])[0]
        text = json.dumps(change(json.loads(old[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(text)) + text + old[8 + size :]

    return make


def entry(name: str = NORM, **values: Any) -> Callable[[bytes], bytes]:
    """A tensor of the header has these values."""
    return header(lambda found: {**found, name: {**found[name], **values}})


def one(value: float, part: str = "q_proj") -> Callable[..., dict[str, np.ndarray]]:
    """One number of each tensor with ``part`` in its name is ``value``."""

    def make(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return each(make, part)


def pickled(name: str) -> Change:
    return write(f"model/{name}", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


CASES = {
    # --- indexes
    "index: cut off": Case("model/model.safetensors.index.json is not valid JSON", (write(INDEX, "{"),)),
    "index: an empty object": Case(
        "model/model.safetensors.index.json is not an index of weights", (write(INDEX, "{}"),)
    ),
    "index: a list": Case(
        "model/model.safetensors.index.json must hold one JSON object, and holds a list", (write(INDEX, "[]"),)
    ),
    "index: not UTF-8": Case("model/model.safetensors.index.json is not UTF-8 text", (write(INDEX, b"\xff"),)),
    "index: nested 100,000 deep": Case(
        "model/model.safetensors.index.json is not valid JSON", (write(INDEX, nested()),)
    ),
    "index: a named pipe": Case(
        "model/model.safetensors.index.json is no file that can be read, but a named pipe", (pipe(INDEX),)
    ),
    "index: a socket": Case(
        "model/model.safetensors.index.json is no file that can be read, but a socket", (socket(INDEX),)
    ),
    "index: a link to zeros without end": Case(
        "model/model.safetensors.index.json is a link that leads out of its folder, to /dev/zero",
        (link(INDEX, "/dev/zero"),),
    ),
    "index: no permission": Case(
        "model/model.safetensors.index.json cannot be read", (write(INDEX, "{}"), mode(INDEX, 0))
    ),
    "index: of a number": index("model/model.safetensors.index.json is not an index of weights", 3),
    "index: of nothing": index("model/model.safetensors.index.json is not an index of weights", {}),
    "index: a number for a name": index(
        "model/model.safetensors.index.json names 1 as a file of weights, where only the name of a .safetenso",
        {NORM: 1},
    ),
    "index: null for a name": index(
        "model/model.safetensors.index.json names None as a file of weights, where only the name of a .safete",
        {NORM: None},
    ),
    "index: a list for a name": index(
        "model/model.safetensors.index.json names ['model.safetensors'] as a file of weights, where only the",
        {NORM: ["model.safetensors"]},
    ),
    "index: an empty name": index(
        "model/model.safetensors.index.json names '' as a file of weights, where only the name of a .safetens",
        {NORM: ""},
    ),
    "index: the folder itself": index(
        "model/model.safetensors.index.json names '.' as a file of weights, where only the name of a .safeten",
        {NORM: "."},
    ),
    "index: out of the folder": index(
        "model/model.safetensors.index.json names '../data/x.safetensors' as a file of weights, where only th",
        {NORM: "../data/x.safetensors"},
    ),
    "index: an absolute path": index(
        "model/model.safetensors.index.json names '/etc/x.safetensors' as a file of weights, where only the n",
        {NORM: "/etc/x.safetensors"},
    ),
    "index: config.json": index(
        "model/model.safetensors.index.json names 'config.json' as a file of weights, where only the name of",
        {NORM: "config.json"},
    ),
    "index: a pickle": index(
        "model/model.safetensors.index.json names 'model_state.pdparams' as a file of weights, where only the",
        {NORM: "model_state.pdparams"},
        pickled("model_state.pdparams"),
    ),
    "index: a name with NUL": index(
        "model/model.safetensors.index.json names 'a\\x00.safetensors' as a file of weights, where only the na",
        {NORM: "a\0.safetensors"},
    ),
    "index: half of a surrogate pair": Case(
        "model/model.safetensors.index.json names '\\ud800.safetensors' as a file of weights, where only the n",
        (write(INDEX, f'{{"weight_map": {{"{NORM}": "\\ud800.safetensors"}}}}'),),
    ),
    "index: a name of 5,000 letters": index(
        "model/model.safetensors.index.json names 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        {NORM: "a" * 5000 + ".safetensors"},
    ),
    "index: a file that is not there": index(
        "model lacks model-00001-of-00002.safetensors, named by model.safetensors.index.json",
        {NORM: "model-00001-of-00002.safetensors"},
    ),
    "index: a folder": index(
        "model/a.safetensors is no file that can be read, but a folder",
        {NORM: "a.safetensors"},
        directory("model/a.safetensors"),
    ),
    "index: a named pipe for a file": index(
        "model/a.safetensors is no file that can be read, but a named pipe",
        {NORM: "a.safetensors"},
        pipe("model/a.safetensors"),
    ),
    "index: a socket for a file": index(
        "model/a.safetensors is no file that can be read, but a socket",
        {NORM: "a.safetensors"},
        socket("model/a.safetensors"),
    ),
    "index: a link to zeros without end for a file": index(
        "model/a.safetensors is a link that leads out of its folder, to /dev/zero",
        {NORM: "a.safetensors"},
        link("model/a.safetensors", "/dev/zero"),
    ),
    # --- pickles
    "pickle: unasked": Case(
        "model has weights in model_state.pdparams alone, a pickle, which is not read unasked because a pickl",
        (remove(WEIGHTS), pickled("model_state.pdparams")),
    ),
    "pickle: with code": Case(
        "model/model_state.pdparams calls os.system, where weights have nothing but tensors, so it is not rea",
        (remove(WEIGHTS), pickled("model_state.pdparams")),
        {"model_name_or_path": "model/model_state.pdparams"},
    ),
    "pickle: that is none": Case(
        "model/model_state.pdparams is not a readable file of weights",
        (write("model/model_state.pdparams", "hello"),),
        {"model_name_or_path": "model/model_state.pdparams"},
    ),
    "pickle: torch's, cut off": Case(
        "model/pytorch_model.bin is not a readable file of weights",
        (write("model/pytorch_model.bin", "PK\x03\x04"),),
        {"model_name_or_path": "model/pytorch_model.bin"},
    ),
    # --- safetensors: the file
    "weights: not there": Case("model has no weights", (remove(WEIGHTS),)),
    "weights: a folder": Case(
        "model/model.safetensors is no file that can be read, but a folder", (directory(WEIGHTS),)
    ),
    "weights: a named pipe": Case(
        "model/model.safetensors is no file that can be read, but a named pipe", (pipe(WEIGHTS),)
    ),
    "weights: no permission": Case("model/model.safetensors cannot be read", (mode(WEIGHTS, 0),)),
    "weights: empty": weights("model/model.safetensors is not a readable safetensors file", lambda old: b""),
    "weights: seven bytes": weights("model/model.safetensors is not a readable safetensors file", lambda old: old[:7]),
    "weights: header alone": weights(
        "model/model.safetensors is not a readable safetensors file",
        lambda old: old[: 8 + struct.unpack("<Q", old[:8])[0]],
    ),
    "weights: cut off": weights("model/model.safetensors is not a readable safetensors file", lambda old: old[:-1]),
    "weights: longer than it says": weights(
        "model/model.safetensors is not a readable safetensors file", lambda old: old + b"\0"
    ),
    "weights: a header of 2**64 - 1": weights(
        "model/model.safetensors is not a readable safetensors file", lambda old: b"\xff" * 8 + old[8:]
    ),
    "weights: a header of 90 MB": weights(
        "model/model.safetensors is not a readable safetensors file",
        lambda old: struct.pack("<Q", 90_000_000) + old[8:],
    ),
    "weights: a header that is no JSON": weights(
        "model/model.safetensors is not a readable safetensors file", lambda old: struct.pack("<Q", 4) + b"{{{{"
    ),
    "weights: a header that is a list": weights(
        "model/model.safetensors is not a readable safetensors file", header(lambda found: [found])
    ),
    "weights: a header nested 10,000 deep": weights(
        "model/model.safetensors is not a readable safetensors file",
        lambda old: struct.pack("<Q", 20_000) + nested(10_000).encode(),
    ),
    "weights: git's pointer": weights(
        "model/model.safetensors is not a readable safetensors file",
        lambda old: b"version https://git-lfs.github.com/spec/v1\n",
    ),
    "weights: a pickle by that name": Case(
        "model/model.safetensors is not a readable safetensors file", (pickled("model.safetensors"),)
    ),
    # --- safetensors: the header
    "header: a dtype that is none": weights(
        "model/model.safetensors is not a readable safetensors file", entry(dtype="F33")
    ),
    "header: a shape of words": weights(
        "model/model.safetensors is not a readable safetensors file", entry(shape=["a"])
    ),
    "header: a shape below 0": weights("model/model.safetensors is not a readable safetensors file", entry(shape=[-1])),
    "header: a shape of 2**63": weights(
        "model/model.safetensors is not a readable safetensors file", entry(shape=[2**63])
    ),
    "header: an overflowing shape": weights(
        "model/model.safetensors is not a readable safetensors file", entry(shape=[2**33, 2**33])
    ),
    "header: no offsets": weights("model/model.safetensors is not a readable safetensors file", entry(data_offsets=[])),
    "header: offsets beyond the end": weights(
        "model/model.safetensors is not a readable safetensors file", entry(data_offsets=[0, 2**40])
    ),
    "header: offsets backwards": weights(
        "model/model.safetensors is not a readable safetensors file", entry(data_offsets=[128, 0])
    ),
    "header: overlapping tensors": weights(
        "model/model.safetensors is not a readable safetensors file", entry(data_offsets=[4, 132])
    ),
    "header: metadata that is a list": weights(
        "model/model.safetensors is not a readable safetensors file",
        header(lambda found: {**found, "__metadata__": []}),
    ),
    # --- safetensors: the tensors
    "tensors: none": tensors(
        "model: config.json says that there are 2 blocks with 2 MLPs, and the files hold 0 tensors", lambda found: {}
    ),
    "tensors: one missing": tensors(
        "model lacks tensors model.norm.weight", lambda found: {k: v for k, v in found.items() if k != NORM}
    ),
    "tensors: one too many": tensors(
        "model holds unknown tensors model.layers.0.self_attn.q_proj.bias",
        lambda found: {**found, "model.layers.0.self_attn.q_proj.bias": found[NORM]},
    ),
    "tensors: transposed": tensors(
        "model: tensor model.layers.0.mlp.down_proj.weight has shape [48, 32], which does not fit config.json",
        each(lambda array: np.ascontiguousarray(array.T), "down_proj"),
    ),
    "tensors: of no dimension": tensors(
        "model: tensor model.layers.0.input_layernorm.weight has shape [], which does not fit config.json",
        each(lambda array: array.reshape(-1)[0], "norm"),
    ),
    "tensors: of three dimensions": tensors(
        "model: tensor model.layers.0.self_attn.q_proj.weight has shape [1, 32, 32], which does not fit confi",
        each(lambda array: array[None], "q_proj"),
    ),
    "tensors: integers": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds I64 and no real numbers",
        each(lambda array: array.astype(np.int64), "q_proj"),
    ),
    "tensors: int8": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds I8 and no real numbers",
        each(lambda array: array.astype(np.int8), "q_proj"),
    ),
    "tensors: bool": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds BOOL and no real numbers",
        each(lambda array: array > 0, "q_proj"),
    ),
    "tensors: uint8": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds U8 and no real numbers",
        each(lambda array: array.astype(np.uint8), "q_proj"),
    ),
    "tensors: uint32": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds U32 and no real numbers",
        each(lambda array: array.astype(np.uint32), "q_proj"),
    ),
    "tensors: float8": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight holds F8_E4M3 and no real numbers",
        each(lambda array: array.astype(ml_dtypes.float8_e4m3fn), "q_proj"),
    ),
    "tensors: integers in the norm": tensors(
        "model/model.safetensors: tensor model.layers.0.input_layernorm.weight holds I32 and no real numbers",
        each(lambda array: array.astype(np.int32), "norm"),
    ),
    "tensors: NaN": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        one(float("nan")),
    ),
    "tensors: infinity": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        one(float("inf")),
    ),
    "tensors: minus infinity in the embedding": tensors(
        "model/model.safetensors: tensor model.embed_tokens.weight has values that are not finite in float32",
        one(float("-inf"), "embed_tokens"),
    ),
    "tensors: NaN in the norm": tensors(
        "model/model.safetensors: tensor model.layers.0.input_layernorm.weight has values that are not finite",
        one(float("nan"), "norm"),
    ),
    "tensors: 10**300 in float64": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finite",
        lambda found: one(1e300)(each(lambda a: a.astype(np.float64))(found)),
    ),
    "tensors: NaN in bfloat16": tensors(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        lambda found: one(float("nan"))(each(lambda a: a.astype(ml_dtypes.bfloat16))(found)),
    ),
    "tensors: NaN under an adapter": Case(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        (of_tensors(WEIGHTS, one(float("nan"))),),
        base=LORA,
    ),
    "tensors: NaN under a quantizer": Case(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        (of_tensors(WEIGHTS, one(float("nan"))),),
        {"weight_quantize_algo": "nf4"},
        LORA,
    ),
    "generate: NaN": Case(
        "model/model.safetensors: tensor model.layers.0.self_attn.q_proj.weight has values that are not finit",
        (of_tensors(WEIGHTS, one(float("nan"))),),
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a"),
    ),
}
