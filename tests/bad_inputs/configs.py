"""Broken models: the folder, config.json and generation_config.json."""

from __future__ import annotations

from typing import Any

from bad_inputs.case import (
    Case,
    directory,
    link,
    mode,
    nested,
    of_json,
    of_numbers,
    pipe,
    remove,
    socket,
    write,
)

CONFIG = "model/config.json"


def config(says: str, **values: Any) -> Case:
    """config.json has these values."""
    return Case(says, (of_json(CONFIG, **values),))


def rope(says: str, **values: Any) -> Case:
    return config(says, rope_parameters=values)


CASES = {
    # --- the folder
    "not there": Case("Model ./missing does not exist", settings={"model_name_or_path": "./missing"}),
    "on no hub": Case(
        "Model nobody/nothing is not a directory here and could not be downloaded from the hub",
        settings={"model_name_or_path": "nobody/nothing"},
    ),
    "an empty name": Case("model_name_or_path is not set", settings={"model_name_or_path": ""}),
    "a file that is no model": Case(
        "Model data/train.json is not a directory", settings={"model_name_or_path": "data/train.json"}
    ),
    "zeros without end": Case("Model /dev/zero is not a directory", settings={"model_name_or_path": "/dev/zero"}),
    "no permission": Case("model/config.json cannot be read", (mode("model", 0),)),
    # --- config.json: the file
    "config: not there": Case("model has no config.json", (remove(CONFIG),)),
    "config: a folder": Case("model/config.json is no file that can be read, but a folder", (directory(CONFIG),)),
    "config: a named pipe": Case("model/config.json is no file that can be read, but a named pipe", (pipe(CONFIG),)),
    "config: a socket": Case("model/config.json is no file that can be read, but a socket", (socket(CONFIG),)),
    "config: a link to zeros without end": Case(
        "model/config.json is a link that leads out of its folder, to /dev/zero", (link(CONFIG, "/dev/zero"),)
    ),
    "config: no permission": Case("model/config.json cannot be read", (mode(CONFIG, 0),)),
    "config: empty": Case("model/config.json is not valid JSON", (write(CONFIG, ""),)),
    "config: cut off": Case("model/config.json is not valid JSON", (write(CONFIG, "{"),)),
    "config: a list": Case("model/config.json must hold one JSON object, and holds a list", (write(CONFIG, "[1]"),)),
    "config: null": Case("model/config.json must hold one JSON object, and holds a NoneType", (write(CONFIG, "null"),)),
    "config: not UTF-8": Case("model/config.json is not UTF-8 text", (write(CONFIG, b'{"model_type": "\xff"}'),)),
    "config: nested 100,000 deep": Case(
        "model/config.json is not valid JSON", (write(CONFIG, f'{{"model_type": "llama", "a": {nested()}}}'),)
    ),
    "config: a number of 5,000 digits": Case(
        "model/config.json is not valid JSON", (write(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"),)
    ),
    # --- config.json: the family
    "model_type: unknown": config("model: model_type 'gpt2' is not a family that is known here", model_type="gpt2"),
    "model_type: none": config("model: model_type None is not a family that is known here", model_type=...),
    "model_type: a list": config(
        "model: model_type ['llama'] is not a family that is known here", model_type=["llama"]
    ),
    "model_type: an object": config("model: model_type {} is not a family that is known here", model_type={}),
    "model_type: a number": config("model: model_type 7 is not a family that is known here", model_type=7),
    "model_type: another than the weights'": config(
        "model lacks tensors model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.q_proj.bias, mode",
        model_type="qwen2",
    ),
    # --- config.json: sizes
    "hidden_size: not there": config(
        "model: config.json must give hidden_size as a whole number above 0, not None", hidden_size=...
    ),
    "hidden_size: a word": config(
        "model: config.json must give hidden_size as a whole number above 0, not 'wide'", hidden_size="wide"
    ),
    "hidden_size: 0": config(
        "model: config.json must give hidden_size as a whole number above 0, not 0", hidden_size=0
    ),
    "hidden_size: below 0": config(
        "model: config.json must give hidden_size as a whole number above 0, not -32", hidden_size=-32
    ),
    "hidden_size: a fraction": config(
        "model: config.json must give hidden_size as a whole number above 0, not 32.5", hidden_size=32.5
    ),
    "hidden_size: true": config(
        "model: config.json must give hidden_size as a whole number above 0, not True", hidden_size=True
    ),
    "hidden_size: a list": config(
        "model: config.json must give hidden_size as a whole number above 0, not [32]", hidden_size=[32]
    ),
    "hidden_size: another": config(
        "model: tensor model.embed_tokens.weight has shape [320, 32], which does not fit config.json",
        hidden_size=64,
        head_dim=16,
    ),
    "hidden_size: 2**63": config(
        "model: config.json must give hidden_size as a whole number of at most 2,147,483,647, not 92233720368",
        hidden_size=2**63,
        head_dim=8,
    ),
    "hidden_size: 10**30": config(
        "model: config.json must give hidden_size as a whole number of at most 2,147,483,647, not 10000000000",
        hidden_size=10**30,
        head_dim=8,
    ),
    "vocab_size: 10**12": config(
        "model: config.json must give vocab_size as a whole number of at most 2,147,483,647, not 100000000000",
        vocab_size=10**12,
    ),
    "vocab_size: 10**30": config(
        "model: config.json must give vocab_size as a whole number of at most 2,147,483,647, not 100000000000",
        vocab_size=10**30,
    ),
    "vocab_size: less than the tokenizer's": config(
        "model: its tokenizer has 320 tokens, its model 300", vocab_size=300
    ),
    "vocab_size: more than the weights": config(
        "model: tensor model.embed_tokens.weight has shape [320, 32], which does not fit config.json", vocab_size=1000
    ),
    "intermediate_size: 10**12": config(
        "model: config.json must give intermediate_size as a whole number of at most 2,147,483,647, not 10000",
        intermediate_size=10**12,
    ),
    "intermediate_size: another": config(
        "model: tensor model.layers.0.mlp.gate_proj.weight has shape [48, 32], which does not fit config.json",
        intermediate_size=64,
    ),
    "num_hidden_layers: 10**6": config(
        "model: config.json must give num_hidden_layers as a whole number of at most 10,000, not 1000000",
        num_hidden_layers=10**6,
    ),
    "num_hidden_layers: 10**12": config(
        "model: config.json must give num_hidden_layers as a whole number of at most 10,000, not 100000000000",
        num_hidden_layers=10**12,
    ),
    "num_hidden_layers: 2**63": config(
        "model: config.json must give num_hidden_layers as a whole number of at most 10,000, not 922337203685",
        num_hidden_layers=2**63,
    ),
    "num_hidden_layers: one more": config(
        "model lacks tensors model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, mode",
        num_hidden_layers=3,
    ),
    "num_hidden_layers: one less": config(
        "model holds unknown tensors model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weig",
        num_hidden_layers=1,
    ),
    "max_position_embeddings: 10**18": config(
        "model: config.json must give max_position_embeddings as a whole number of at most 2,147,483,647, not",
        max_position_embeddings=10**18,
    ),
    "max_position_embeddings: 2**63": config(
        "model: config.json must give max_position_embeddings as a whole number of at most 2,147,483,647, not",
        max_position_embeddings=2**63,
    ),
    "max_position_embeddings: 10**30": config(
        "model: config.json must give max_position_embeddings as a whole number of at most 2,147,483,647, not",
        max_position_embeddings=10**30,
    ),
    "max_position_embeddings: 1": config(
        "A record has 31 tokens and model reads at most 2, the last of which is only predicted",
        max_position_embeddings=1,
    ),
    "head_dim: another": config(
        "model: tensor model.layers.0.self_attn.q_proj.weight has shape [32, 32], which does not fit config.j",
        head_dim=16,
    ),
    "head_dim: odd": config(
        "model: rotary embedding turns pairs of dimensions, and config.json gives 7 of the 7 of a head to it",
        head_dim=7,
    ),
    "head_dim: 10**12": config(
        "model: config.json must give head_dim as a whole number of at most 2,147,483,647, not 1000000000000",
        head_dim=10**12,
    ),
    "num_attention_heads: 3": config(
        "model: config.json must give hidden_size as a multiple of num_attention_heads 3, not 32",
        num_attention_heads=3,
        head_dim=...,
    ),
    "num_attention_heads: 10**12": config(
        "model: config.json must give num_attention_heads as a whole number of at most 2,147,483,647, not 100",
        num_attention_heads=10**12,
        num_key_value_heads=10**12,
    ),
    "num_key_value_heads: no divisor": config(
        "model: config.json must give num_key_value_heads as a divisor of num_attention_heads 4, not 3",
        num_key_value_heads=3,
    ),
    "num_key_value_heads: 8": config(
        "model: config.json must give num_key_value_heads as a divisor of num_attention_heads 4, not 8",
        num_key_value_heads=8,
    ),
    # --- config.json: other values
    "rms_norm_eps: null": config(
        "model: config.json must give rms_norm_eps as a number above 0, not None", rms_norm_eps=None
    ),
    "rms_norm_eps: a word": config(
        "model: config.json must give rms_norm_eps as a number above 0, not 'small'", rms_norm_eps="small"
    ),
    "rms_norm_eps: below 0": config(
        "model: config.json must give rms_norm_eps as a number above 0, not -1e-06", rms_norm_eps=-1e-6
    ),
    "rms_norm_eps: NaN": config(
        "model: config.json must give rms_norm_eps as a number above 0, not nan", rms_norm_eps=float("nan")
    ),
    "rms_norm_eps: 10**300": config(
        "model: config.json must give rms_norm_eps as a number from 1.2e-38 to 3.4e+38, which is what float32",
        rms_norm_eps=1e300,
    ),
    "rms_norm_eps: 1e-320": Case(
        "model: config.json must give rms_norm_eps as a number from 1.2e-38 to 3.4e+38, which is what float32 holds, "
        "not 1e-320.",
        (of_numbers(CONFIG, rms_norm_eps="1e-320"),),
    ),
    "rope_theta: a word": config(
        "model: config.json must give rope_theta as a number above 1, not 'many'",
        rope_parameters=...,
        rope_theta="many",
    ),
    "rope_theta: a list": config(
        "model: config.json must give rope_theta as a number above 1, not [10000]",
        rope_parameters=...,
        rope_theta=[10000],
    ),
    "rope_theta: -1": config(
        "model: config.json must give rope_theta as a number above 1, not -1", rope_parameters=..., rope_theta=-1
    ),
    "rope_theta: 0": config(
        "model: config.json must give rope_theta as a number above 1, not 0", rope_parameters=..., rope_theta=0
    ),
    "rope_theta: 10**400": config(
        "model: config.json must give rope_theta as a number above 1, not 100000000000000000...00000000000000",
        rope_parameters=...,
        rope_theta=10**400,
    ),
    "rope_scaling: a word": config(
        "model: config.json must give rope_scaling as an object or null, not 'linear'", rope_parameters="linear"
    ),
    "rope_scaling: a list": config(
        "model: config.json must give rope_scaling as an object or null, not ['linear']", rope_parameters=["linear"]
    ),
    "rope_scaling: of an unknown kind": rope(
        "model: rotary scaling 'spiral' is not known", rope_type="spiral", rope_theta=1e4
    ),
    "rope_scaling: its kind a list": rope(
        "model: rotary scaling ['linear'] is not known", rope_type=["linear"], rope_theta=1e4
    ),
    "rope_scaling: linear without factor": rope(
        "model: config.json must give rope_scaling.factor as a number above 0, not None",
        rope_type="linear",
        rope_theta=1e4,
    ),
    "rope_scaling: a factor of 0": rope(
        "model: config.json must give rope_scaling.factor as a number above 0, not 0",
        rope_type="linear",
        factor=0,
        rope_theta=1e4,
    ),
    "rope_scaling: a factor that is a word": rope(
        "model: config.json must give rope_scaling.factor as a number above 0, not 'two'",
        rope_type="dynamic",
        factor="two",
        rope_theta=1e4,
    ),
    "rope_scaling: llama3 cut short": rope(
        "model: config.json must give rope_scaling.low_freq_factor as a number above 0, not None",
        rope_type="llama3",
        factor=8,
        rope_theta=1e4,
    ),
    "rope_scaling: longrope of three": rope(
        "model: config.json must give rope_scaling.short_factor as a list of 4 numbers above 0, not [1, 1, 1]",
        rope_type="longrope",
        short_factor=[1] * 3,
        long_factor=[1] * 3,
    ),
    "hidden_act: unknown": config(
        "model: config.json must give hidden_act as one of silu, swish, not 'relu'", hidden_act="relu"
    ),
    "hidden_act: a number": config(
        "model: config.json must give hidden_act as one of silu, swish, not 1", hidden_act=1
    ),
    "attention_bias: a word": config(
        "model: config.json must give attention_bias as true or false, not 'yes'", attention_bias="yes"
    ),
    "attention_bias: true": config(
        "model lacks tensors model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.o_proj.bias, mode",
        attention_bias=True,
    ),
    "tie_word_embeddings: false": config("model lacks tensors lm_head.weight", tie_word_embeddings=False),
    "tie_word_embeddings: a number": config(
        "model: config.json must give tie_word_embeddings as true or false, not 1", tie_word_embeddings=1
    ),
    "quantization_config": config(
        "model: quantization_config = {'bits': 4} is not computed here", quantization_config={"bits": 4}
    ),
    "sliding_window: a word": config(
        "model: config.json must give sliding_window as a whole number above 0, not 'wide'",
        model_type="mistral",
        sliding_window="wide",
    ),
    "sliding_window: 0": config(
        "model: config.json must give sliding_window as a whole number above 0, not 0",
        model_type="mistral",
        sliding_window=0,
    ),
    "layer_types: a word": config(
        "model: config.json must give layer_types as 2 words, each sliding_attention or full_attention, not '",
        model_type="mistral",
        layer_types="full",
    ),
    "layer_types: of lists": config(
        "model: config.json must give layer_types as 2 words, each sliding_attention or full_attention, not [",
        model_type="mistral",
        layer_types=[["full_attention"], []],
    ),
    "experts: more chosen than there are": config(
        "model: config.json must give num_experts_per_tok as at most the number of experts, 2, not 4",
        model_type="mixtral",
        num_local_experts=2,
        num_experts_per_tok=4,
    ),
    "experts: 10**9": config(
        "model: config.json must give num_local_experts as a whole number of at most 10,000, not 1000000000",
        model_type="mixtral",
        num_local_experts=10**9,
    ),
    "gemma: an attention scale of 10**-300": config(
        "model: config.json must give query_pre_attn_scalar as a number from 1.2e-38 to 3.4e+38, which is wha",
        model_type="gemma2",
        query_pre_attn_scalar=1e-300,
    ),
    "granite: a logit scale of 1e-320": Case(
        "model: config.json must give logits_scaling as a number from 1.2e-38 to 3.4e+38, which is what float32 holds, "
        "not 1e-320.",
        (of_json(CONFIG, model_type="granite"), of_numbers(CONFIG, logits_scaling="1e-320")),
    ),
    "generate: model not there": Case(
        "Model ./missing does not exist", typed=("generate", "--model_name_or_path", "./missing", "--prompt", "a")
    ),
    "generate: a broken config": Case(
        "model/config.json is not valid JSON",
        (write(CONFIG, "{"),),
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a"),
    ),
    "generation_config.json: nested 100,000 deep": Case(
        "model/generation_config.json is not valid JSON", (write("model/generation_config.json", nested()),)
    ),
    "generation_config.json: a list": Case(
        "model/generation_config.json must hold one JSON object, and holds a list",
        (write("model/generation_config.json", "[1]"),),
    ),
    "generation_config.json: no permission": Case(
        "model/generation_config.json cannot be read",
        (write("model/generation_config.json", "{}"), mode("model/generation_config.json", 0)),
    ),
}
