"""Broken adapters, in training that goes on from one, in answers and in merging."""

from __future__ import annotations

import json
import struct
from typing import Any

from bad_inputs.adapter_files import FAULTS, WEIGHTS
from bad_inputs.case import LORA, Case, Change, edit, nested, of_tensors, remove, write
from bad_inputs.weights import one

ON_FROM = {**{k: v for k, v in LORA.items() if k != "lora_rank"}, "lora_path": "done"}
GENERATE = (
    "generate",
    "--model_name_or_path",
    "model",
    "--adapter_path",
    "done",
    "--prompt",
    "a",
    "--max_new_tokens",
    "2",
)
EVALUATE = (
    "evaluate",
    "--model_name_or_path",
    "model",
    "--adapter_path",
    "done",
    "--dataset_name_or_path",
    "data/train.json",
)
MERGE = ("merge", "--model_name_or_path", "model", "--adapter_path", "done", "--output_path", "merged")
WAYS: dict[str, Any] = {
    "going on": {"base": ON_FROM},
    "generate": {"typed": GENERATE},
    "merge": {"typed": MERGE},
}


def metadata(key: str, value: str) -> Change:
    def make(old: bytes) -> bytes:
        size = struct.unpack("<Q", old[:8])[0]
        header = json.loads(old[8 : 8 + size])
        header["__metadata__"] = {**header.get("__metadata__", {}), key: value}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + old[8 + size :]

    return edit(WEIGHTS, make)


CASES = {
    **{
        f"{way}: {fault}": Case(says, tuple(changes), **how)
        for fault, (says, *changes) in FAULTS.items()
        for way, how in WAYS.items()
    },
    "folder not there": Case(
        "missing holds no adapter",
        typed=("generate", "--model_name_or_path", "model", "--adapter_path", "missing", "--prompt", "a"),
    ),
    "a folder that is no adapter": Case(
        "lora_path data holds no adapter", base=ON_FROM, settings={"lora_path": "data"}
    ),
    "a file": Case(
        "data/train.json holds no adapter",
        typed=("generate", "--model_name_or_path", "model", "--adapter_path", "data/train.json", "--prompt", "a"),
    ),
    "metadata: quantizer that is no JSON": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.quantizer", "{"),),
        typed=GENERATE,
    ),
    "metadata: quantizer a list": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.quantizer", "[1]"),),
        typed=GENERATE,
    ),
    "metadata: quantizer a number": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.quantizer", "1"),),
        typed=GENERATE,
    ),
    "metadata: quantizer of numbers": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.quantizer", '{"plugin": [1]}'),),
        typed=GENERATE,
    ),
    "metadata: quantizer that is not installed": Case(
        "done was trained over a base that plugin magic changes, which is not installed",
        (metadata("sft.quantizer", '{"plugin": ["magic"]}'),),
        typed=GENERATE,
    ),
    "metadata: quantizer nested 100,000 deep": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.quantizer", nested()),),
        typed=GENERATE,
    ),
    "metadata: config that is no JSON": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.config", "{"),),
        typed=GENERATE,
    ),
    "metadata: config of numbers": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.config", '{"lora": 1}'),),
        typed=GENERATE,
    ),
    "metadata: config a word": Case(
        "done: what adapter_model.safetensors says of its base's plugins is damaged",
        (metadata("sft.config", '"lora"'),),
        typed=GENERATE,
    ),
    "metadata: options of another type": Case(
        "lora_rank: expected a whole number of at least 1, got 'x'",
        (metadata("sft.config", '{"lora": {"lora_rank": "x"}}'),),
        typed=GENERATE,
    ),
    "metadata: renamed that is no JSON": Case(
        "done: what adapter_model.safetensors says of its layers' names is damaged",
        (metadata("sft.renamed", "{"),),
        typed=GENERATE,
    ),
    "metadata: renamed of numbers": Case(
        "done: what adapter_model.safetensors says of its layers' names is damaged",
        (metadata("sft.renamed", "[1]"),),
        typed=GENERATE,
    ),
    "metadata: renamed nested 100,000 deep": Case(
        "done: what adapter_model.safetensors says of its layers' names is damaged",
        (metadata("sft.renamed", nested()),),
        typed=GENERATE,
    ),
    "metadata: renamed from nothing": Case(
        "done: what adapter_model.safetensors says of its layers' names is damaged",
        (metadata("sft.renamed", '[["", "x"]]'),),
        typed=GENERATE,
    ),
    "its template is no JSON": Case(
        "done/tokenizer_config.json is not valid JSON",
        (remove("done/chat_template.jinja"), write("done/tokenizer_config.json", "{")),
        typed=GENERATE,
    ),
    "its template is not closed": Case(
        "The chat template of done is not valid Jinja", (write("done/chat_template.jinja", "{% for"),), typed=GENERATE
    ),
    "its template never ends": Case(
        "The chat template of done cannot write a conversation of user: it takes more steps than",
        (
            write(
                "done/chat_template.jinja",
                "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            ),
        ),
        typed=GENERATE,
    ),
    "its template takes the machine": Case(
        "The chat template of done cannot write a conversation of user: it makes texts or lists without measu",
        (write("done/chat_template.jinja", "{{ 'a' * 10000000000 }}"),),
        typed=GENERATE,
    ),
    "evaluate: NaN": Case(
        "done/adapter_model.safetensors: tensor base_model.model.model.layers.0.mlp.down_proj.lora_A.weight h",
        (of_tensors(WEIGHTS, one(float("nan"), "lora_A")),),
        typed=EVALUATE,
    ),
    "merge: into a folder that is not empty": Case("data already exists and is not empty", typed=(*MERGE[:-1], "data")),
    "merge: into a file": Case(
        "data/train.json already exists and is not empty", typed=(*MERGE[:-1], "data/train.json")
    ),
    "merge: below a file": Case(
        "data/train.json/.staging-merged cannot be made", typed=(*MERGE[:-1], "data/train.json/merged")
    ),
    "merge: a path with NUL": Case("output: a\\x00b cannot be used as a path", typed=(*MERGE[:-1], "a\0b")),
    "vera: of another kind": Case("Unknown setting lora_path", base={**ON_FROM, "plugin": "vera", "lora_path": "done"}),
}
