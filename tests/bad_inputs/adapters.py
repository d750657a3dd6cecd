"""Broken adapters, in training that goes on from one, in answers and in merging."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from bad_inputs.case import (
    LORA,
    Case,
    Change,
    directory,
    each,
    edit,
    mode,
    nested,
    of_json,
    of_numbers,
    of_tensors,
    pipe,
    remove,
    write,
)
from bad_inputs.weights import one

CONFIG, WEIGHTS = "done/adapter_config.json", "done/adapter_model.safetensors"
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
FAULTS: dict[str, tuple[Any, ...]] = {
    "config not there": (
        "done holds no adapter",
        remove(CONFIG),
    ),
    "config cut off": (
        "done/adapter_config.json is not valid JSON",
        write(CONFIG, "{"),
    ),
    "config a list": (
        "done/adapter_config.json must hold one JSON object, and holds a list",
        write(CONFIG, "[]"),
    ),
    "config nested 100,000 deep": (
        "done/adapter_config.json is not valid JSON",
        write(CONFIG, nested()),
    ),
    "config not UTF-8": (
        "done/adapter_config.json is not UTF-8 text",
        write(CONFIG, b"\xff"),
    ),
    "config a folder": ("done holds no adapter", remove(CONFIG), directory(CONFIG)),
    "config a named pipe": (
        "done holds no adapter",
        pipe(CONFIG),
    ),
    "config without permission": (
        "done/adapter_config.json cannot be read",
        mode(CONFIG, 0),
    ),
    "peft_type not there": (
        "done/adapter_config.json names no peft_type, so it is not an adapter's config",
        of_json(CONFIG, peft_type=...),
    ),
    "peft_type unknown": (
        "done is a MAGIC adapter",
        of_json(CONFIG, peft_type="MAGIC"),
    ),
    "peft_type a list": (
        "done/adapter_config.json names no peft_type, so it is not an adapter's config",
        of_json(CONFIG, peft_type=["LORA"]),
    ),
    "peft_type a number": (
        "done/adapter_config.json names no peft_type, so it is not an adapter's config",
        of_json(CONFIG, peft_type=1),
    ),
    "r a word": (
        "done: adapter_config.json must give r as a number from 1e-09 to 1e+09, not 'two'",
        of_json(CONFIG, r="two"),
    ),
    "r null": (
        "done: adapter_config.json must give r as a number from 1e-09 to 1e+09, not None",
        of_json(CONFIG, r=None),
    ),
    "r a list": (
        "done: adapter_config.json must give r as a number from 1e-09 to 1e+09, not [2]",
        of_json(CONFIG, r=[2]),
    ),
    "r another": (
        "done: model.layers.0.mlp.down_proj has rank 2, adapter_config.json says 3",
        of_json(CONFIG, r=3),
    ),
    "r NaN": (
        "done: adapter_config.json must give r as a number from 1e-09 to 1e+09, not nan",
        of_json(CONFIG, r=float("nan")),
    ),
    "lora_alpha a word": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not 'ma",
        of_json(CONFIG, lora_alpha="many"),
    ),
    "lora_alpha null": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not Non",
        of_json(CONFIG, lora_alpha=None),
    ),
    "lora_alpha NaN": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not nan",
        of_json(CONFIG, lora_alpha=float("nan")),
    ),
    "lora_alpha infinite": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not inf",
        of_json(CONFIG, lora_alpha=float("inf")),
    ),
    "lora_alpha 10**308": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not 1e+",
        of_json(CONFIG, lora_alpha=1e308),
    ),
    "lora_alpha 10**400": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not 100",
        of_json(CONFIG, lora_alpha=10**400),
    ),
    "lora_alpha 1e-320": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not 1e-320",
        of_numbers(CONFIG, lora_alpha="1e-320"),
    ),
    "lora_alpha true": (
        "done: adapter_config.json must give lora_alpha as a number from 1e-09 to 1e+09, not Tru",
        of_json(CONFIG, lora_alpha=True),
    ),
    "target_modules of null": (
        "done/adapter_config.json must give target_modules as names, not [None]",
        of_json(CONFIG, target_modules=[None]),
    ),
    "rank_pattern a list": (
        "done: adapter_config.json must give rank_pattern as an object of names and numbers, not ['",
        of_json(CONFIG, rank_pattern=["q_proj"]),
    ),
    "rank_pattern a word": (
        "done: adapter_config.json must give rank_pattern as an object of names and numbers, not 'q",
        of_json(CONFIG, rank_pattern="q_proj"),
    ),
    "rank_pattern of words": (
        "done: adapter_config.json must give rank_pattern of q_proj as a number from 1e-09 to 1e+09, n",
        of_json(CONFIG, rank_pattern={"q_proj": "two"}),
    ),
    "rank_pattern a broken expression": (
        "done: in adapter_config.json, rank_pattern … is not a valid regular expression",
        of_json(CONFIG, rank_pattern={"(": 2}),
    ),
    "rank_pattern without end": (
        "done: in adapter_config.json, rank_pattern … takes too long",
        of_json(CONFIG, rank_pattern={"(?:.|..|...)*(?:.|..|...)*[A-C]": 2}),
    ),
    "alpha_pattern a number": (
        "done: adapter_config.json must give alpha_pattern as an object of names and numbers, not 1",
        of_json(CONFIG, alpha_pattern=1),
    ),
    "alpha_pattern of null": (
        "done: adapter_config.json must give alpha_pattern of q_proj as a number from 1e-09 to 1e+09,",
        of_json(CONFIG, alpha_pattern={"q_proj": None}),
    ),
    "alpha_pattern a broken expression": (
        "done: in adapter_config.json, alpha_pattern … is not a valid regular expression",
        of_json(CONFIG, alpha_pattern={"[": 2}),
    ),
    "use_dora": (
        "done: use_dora = True is more than LoRA",
        of_json(CONFIG, use_dora=True),
    ),
    "use_rslora a word": (
        "done: adapter_config.json must give use_rslora as true or false",
        of_json(CONFIG, use_rslora="no"),
    ),
    "bias all": (
        "done: bias = 'all' is more than LoRA",
        of_json(CONFIG, bias="all"),
    ),
    "modules_to_save": (
        "done: modules_to_save = ['lm_head'] is more than LoRA",
        of_json(CONFIG, modules_to_save=["lm_head"]),
    ),
    "init_lora_weights of PiSSA": (
        "done: init_lora_weights = 'pissa' changed the base that it was trained over",
        of_json(CONFIG, init_lora_weights="pissa"),
    ),
    "init_lora_weights a list": (
        "done: init_lora_weights = ['pissa'] changed the base that it was trained over",
        of_json(CONFIG, init_lora_weights=["pissa"]),
    ),
    "weights not there": (
        "done has no adapter_model.safetensors",
        remove(WEIGHTS),
    ),
    "weights a folder": ("done has no adapter_model.safetensors", remove(WEIGHTS), directory(WEIGHTS)),
    "weights a named pipe": (
        "done has no adapter_model.safetensors",
        pipe(WEIGHTS),
    ),
    "weights without permission": (
        "done/adapter_model.safetensors cannot be read",
        mode(WEIGHTS, 0),
    ),
    "weights empty": (
        "done/adapter_model.safetensors is not a readable safetensors file",
        write(WEIGHTS, b""),
    ),
    "weights cut off": (
        "done/adapter_model.safetensors is not a readable safetensors file",
        edit(WEIGHTS, lambda old: old[:-1]),
    ),
    "weights pickled": (
        "done has no adapter_model.safetensors and adapter_model.bin is a pickle, which is not read",
        remove(WEIGHTS),
        write("done/adapter_model.bin", b"\x80\x02}."),
    ),
    "a header of 2**64 - 1": (
        "done/adapter_model.safetensors is not a readable safetensors file",
        edit(WEIGHTS, lambda old: b"\xff" * 8 + old[8:]),
    ),
    "no tensors": (
        "done holds no LoRA weights",
        of_tensors(WEIGHTS, lambda found: {}),
    ),
    "half of a pair": (
        "done: the pair of lora_A and lora_B for model.layers.0.mlp.down_proj is not complete",
        of_tensors(WEIGHTS, lambda found: dict(list(found.items())[1:])),
    ),
    "another rank in B": (
        "done: the pair of lora_A and lora_B for model.layers.0.mlp.down_proj is not complete",
        of_tensors(WEIGHTS, each(lambda array: np.concatenate([array, array], 1), "lora_B")),
    ),
    "another width": (
        "model.layers.0.mlp.down_proj",
        of_tensors(WEIGHTS, each(lambda array: np.concatenate([array, array], 1), "lora_A")),
    ),
    "of one dimension": (
        "has 1 dimensions, and LoRA's have 2",
        of_tensors(WEIGHTS, each(lambda array: array.reshape(-1), "lora_A")),
    ),
    "of no dimension": (
        "has 0 dimensions, and LoRA's have 2",
        of_tensors(WEIGHTS, each(lambda array: array.reshape(-1)[0])),
    ),
    "an unknown layer": (
        "model.layers.7.mlp.down_proj",
        of_tensors(WEIGHTS, lambda found: {k.replace("layers.0", "layers.7"): v for k, v in found.items()}),
    ),
    "an unknown tensor": (
        "done: tensor hello is not a LoRA weight of the PEFT layout",
        of_tensors(WEIGHTS, lambda found: {**found, "hello": np.ones(3, np.float32)}),
    ),
    "integers": (
        "lora_A.weight holds int32 and no real numbers",
        of_tensors(WEIGHTS, each(lambda array: array.astype(np.int32))),
    ),
    "bool": (
        "lora_A.weight holds bool and no real numbers",
        of_tensors(WEIGHTS, each(lambda array: array > 0, "lora_A")),
    ),
    "NaN": (
        "lora_A.weight has values that are not finite",
        of_tensors(WEIGHTS, one(float("nan"), "lora_A")),
    ),
    "infinity": (
        "lora_B.weight has values that are not finite",
        of_tensors(WEIGHTS, one(float("inf"), "lora_B")),
    ),
}
"""What must be said, in each of the ``WAYS``, and what is wrong."""


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
