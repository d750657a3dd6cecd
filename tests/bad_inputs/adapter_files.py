"""What may be wrong with the files of an adapter of LoRA: its config, and its weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from bad_inputs.case import (
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
        "use_dora = True",
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
        "done: adapter_config.json names lm_head in modules_to_save, and adapter_model.safetensors holds no",
        of_json(CONFIG, modules_to_save=["lm_head"]),
    ),
    "modules_to_save a word": (
        "done: adapter_config.json must give modules_to_save as names, not 'lm_head'",
        of_json(CONFIG, modules_to_save="lm_head"),
    ),
    "modules_to_save of numbers": (
        "done: adapter_config.json must give modules_to_save as names, not [1]",
        of_json(CONFIG, modules_to_save=[1]),
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
"""What must be said, and what is wrong."""
