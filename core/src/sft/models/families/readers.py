"""From the ``config.json`` of each family to its :class:`Architecture`. One function reads a family; what it does not
read has no influence on what the family computes, or is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sft.models.architecture import Architecture, Block, Experts, Norms
from sft.models.families.values import FULL, SLIDING, Values

_SILU = {"silu": "silu", "swish": "silu"}
_GELU = {"gelu_pytorch_tanh": "gelu_tanh"}
_AROUND = Norms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def _plain(
    values: Values,
    *,
    longest: int = 2048,
    kv_heads: int | None = None,
    head_size: int | None = None,
    base: float = 10000.0,
    share: float | None = None,
    epsilon: float = 1e-6,
    tied: bool = False,
    **more: Any,
) -> Architecture:
    """What Llama has, with the family's defaults; all blocks alike. ``more`` are fields of the architecture."""
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    if values["head_dim"] is None and head_size is None and hidden % heads:
        raise values.wrong("hidden_size", f"a multiple of num_attention_heads {heads}")
    size = values.count("head_dim", head_size or hidden // heads)
    # Null is one for each head in every family, also where what is missing is another number.
    missing = "num_key_value_heads" not in values
    kept = values.count("num_key_value_heads", kv_heads if kv_heads and missing else heads)
    if heads % kept:
        raise values.wrong("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    longest = values.count("max_position_embeddings", longest)
    # The last two are PaddleNLP's.
    values.refuse("quantization_config", "use_bidirectional_attention", "alibi", "use_long_sequence_strategies")
    fields: dict[str, Any] = {
        "vocabulary": values.count("vocab_size"),
        "hidden": hidden,
        "inner": values.count("intermediate_size"),
        "heads": heads,
        "kv_heads": kept,
        "head_size": size,
        "blocks": (Block(),) * values.count("num_hidden_layers", most=10_000),
        "norm_epsilon": values.number("rms_norm_eps", epsilon),
        "tied": values.flag("tie_word_embeddings", tied),
    }
    fields.update(more)
    if "rotaries" not in fields:
        fields["rotaries"] = (values.rotary(size, longest, base, share=share),)
    if "positions" not in more:
        fields["positions"] = fields["rotaries"][0].reach
    return Architecture(**fields)


def _attention_bias(values: Values) -> dict[str, bool]:
    """The fields of an architecture whose one flag is for q, k, v and o."""
    bias = values.flag("attention_bias", False)
    return {"attention_bias": bias, "output_bias": bias}


def _by_block(architecture: Architecture, field: str, values: Iterable[Any]) -> Architecture:
    """``architecture`` whose blocks have ``values``, one each, as their ``field``."""
    blocks = zip(architecture.blocks, values, strict=True)
    return replace(architecture, blocks=tuple(replace(block, **{field: value}) for block, value in blocks))


def _in_windows(architecture: Architecture, kinds: list[str], window: int | None) -> Architecture:
    return _by_block(architecture, "window", [window if kind == SLIDING else None for kind in kinds])


def _switched_window(values: Values, default: int | None = None) -> int | None:
    """``sliding_window``, where ``use_sliding_window`` is on."""
    return values.window(default) if values.flag("use_sliding_window", False) else None


def llama(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    return _plain(values, **_attention_bias(values), mlp_bias=values.flag("mlp_bias", False))


def mistral(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    architecture = _plain(values, longest=4096 * 32, kv_heads=8)
    count = len(architecture.blocks)
    return _in_windows(architecture, values.kinds(count, [SLIDING] * count), values.window(4096))


def _qwen_windows(values: Values, architecture: Architecture) -> Architecture:
    count = len(architecture.blocks)
    window = _switched_window(values, 4096)
    below = values.count("max_window_layers", 28, least=0)
    otherwise = [SLIDING if window is not None and number >= below else FULL for number in range(count)]
    return _in_windows(architecture, values.kinds(count, otherwise), window)


def qwen2(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    return _qwen_windows(values, _plain(values, longest=32768, kv_heads=32, attention_bias=True))


def qwen3(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    bias = _attention_bias(values)
    architecture = _plain(values, longest=32768, kv_heads=32, head_size=128, head_norm="head", **bias)
    return _qwen_windows(values, architecture)


def gemma(values: Values) -> Architecture:
    # The first releases say "gelu" and mean the tanh form, as transformers reads it.
    word = "hidden_activation" if values["hidden_activation"] is not None else "hidden_act"
    values.word(word, {**_GELU, "gelu": "gelu_tanh"}, "gelu_pytorch_tanh")
    return _gemma(values, longest=8192, kv_heads=16)


def _gemma(values: Values, **more: Any) -> Architecture:
    fields: dict[str, Any] = {
        "head_size": 256,
        "tied": True,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": values.count("hidden_size") ** 0.5,
        **_attention_bias(values),
    }
    return _plain(values, **{**fields, **more})


def gemma2(values: Values) -> Architecture:
    values.word("hidden_activation", _GELU, "gelu_pytorch_tanh")
    architecture = _gemma(
        values,
        longest=8192,
        kv_heads=4,
        norms=_AROUND,
        attention_scale=values.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=values.optional("attn_logit_softcapping", 50.0),
        logit_cap=values.optional("final_logit_softcapping", 30.0),
    )
    count = len(architecture.blocks)
    kinds = values.kinds(count, [FULL if number % 2 else SLIDING for number in range(count)])
    return _in_windows(architecture, kinds, values.window(4096))


def gemma3(values: Values) -> Architecture:
    values.word("hidden_activation", _GELU, "gelu_pytorch_tanh")
    values.refuse("attn_logit_softcapping")  # Gemma 2's: transformers reads it here, and caps nothing
    size, positions = values.count("head_dim", 256), values.count("max_position_embeddings", 131072)
    local = values.number("rope_local_base_freq", 10000.0)
    # What scales the others leaves windows alone.
    kinds_apart = values["rope_parameters"] if isinstance(values["rope_parameters"], dict) else {}
    windowed = Values({"rope_parameters": kinds_apart.get(SLIDING)}, values.where)
    rotaries = (values.rotary(size, positions, 1e6, FULL), windowed.rotary(size, positions, local))
    architecture = _gemma(
        values,
        positions=positions,
        kv_heads=4,
        norms=_AROUND,
        rotaries=rotaries,
        head_norm="head",
        attention_scale=values.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=values.optional("final_logit_softcapping"),
    )
    count = len(architecture.blocks)
    every = values.count("sliding_window_pattern", 6)
    kinds = values.kinds(count, [SLIDING if (number + 1) % every else FULL for number in range(count)])
    architecture = _in_windows(architecture, kinds, values.window(4096))
    return _by_block(architecture, "rotary", [int(kind == SLIDING) for kind in kinds])


def phi3(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    if values["original_max_position_embeddings"] is None:
        values = values.having(original_max_position_embeddings=4096)
    architecture = _plain(values, longest=4096, share=1.0, epsilon=1e-5, fused_attention=True, fused_mlp=True)
    return _in_windows(architecture, [SLIDING] * len(architecture.blocks), values.window())


def smollm3(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    architecture = _plain(
        values,
        longest=32768,
        kv_heads=4,
        base=2e6,
        tied=True,
        **_attention_bias(values),
        mlp_bias=values.flag("mlp_bias", False),
    )
    count = len(architecture.blocks)
    turns = values["no_rope_layers"]
    if turns is None:
        every = values.count("no_rope_layer_interval", 4)
        turns = [int((number + 1) % every != 0) for number in range(count)]
    if not isinstance(turns, list) or len(turns) < count or any(turn not in (0, 1) for turn in turns):
        raise values.wrong("no_rope_layers", f"a list of {count} numbers, 0 or 1")
    window = _switched_window(values)
    turns = turns[:count]
    otherwise = [SLIDING if window is not None and not turn else FULL for turn in turns]
    architecture = _in_windows(architecture, values.kinds(count, otherwise), window)
    return _by_block(architecture, "rotary", [0 if turn else None for turn in turns])


def granite(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    return _plain(
        values,
        **_attention_bias(values),
        mlp_bias=values.flag("mlp_bias", False),
        attention_scale=values.number("attention_multiplier", 1.0),
        embedding_scale=values.number("embedding_multiplier", 1.0),
        residual_scale=values.number("residual_multiplier", 1.0),
        logit_scale=1.0 / values.number("logits_scaling", 1.0),
    )


def olmo2(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    return _plain(
        values,
        epsilon=1e-5,
        **_attention_bias(values),
        head_norm="all",
        norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    )


def glm4(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    size, positions = values.count("head_dim", 128), values.count("max_position_embeddings", 131072)
    return _plain(
        values,
        longest=131072,
        kv_heads=2,
        head_size=128,
        epsilon=0.00000015625,
        rotaries=(values.rotary(size, positions, 10000.0, share=0.5, interleaved=True),),
        fused_mlp=True,
        attention_bias=values.flag("attention_bias", True),
        norms=Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    )


# --- with experts ---------------------------------------------------------------------------------------------


def mixtral(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    architecture = _plain(values, longest=4096 * 32, kv_heads=8, base=1e6, epsilon=1e-5)
    experts = Experts(
        values.count("num_local_experts", 8, most=10_000),
        values.count("num_experts_per_tok", 2),
        architecture.inner,
        normalise=True,
    )
    _check_chosen(values, experts)
    count = len(architecture.blocks)
    architecture = _in_windows(architecture, [SLIDING] * count, values.window())
    return _by_block(architecture, "experts", [experts] * count)


def _check_chosen(values: Values, experts: Experts) -> None:
    if experts.chosen > experts.count:
        raise values.wrong("num_experts_per_tok", f"at most the number of experts, {experts.count}")


def _qwen_experts(values: Values, architecture: Architecture, experts: Experts) -> Architecture:
    _check_chosen(values, experts)
    alone, every = values.layers("mlp_only_layers"), values.count("decoder_sparse_step", 1)
    numbers = range(len(architecture.blocks))
    sparse = [None if number in alone or (number + 1) % every else experts for number in numbers]
    return _by_block(architecture, "experts", sparse)


def qwen2_moe(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    architecture = _plain(values, longest=32768, kv_heads=16, attention_bias=values.flag("qkv_bias", True))
    experts = Experts(
        values.count("num_experts", 60, most=10_000),
        values.count("num_experts_per_tok", 4),
        values.count("moe_intermediate_size", 1408),
        values.flag("norm_topk_prob", False),
        values.count("shared_expert_intermediate_size", 5632),
    )
    window = _switched_window(values, 4096)
    below = values.count("max_window_layers", 28, least=0)
    count = len(architecture.blocks)
    otherwise = [SLIDING if window and number % 2 == 0 and number < below else FULL for number in range(count)]
    return _qwen_experts(values, _in_windows(architecture, values.kinds(count, otherwise), window), experts)


def qwen3_moe(values: Values) -> Architecture:
    values.word("hidden_act", _SILU, "silu")
    architecture = _plain(values, longest=32768, kv_heads=4, head_norm="head", **_attention_bias(values))
    experts = Experts(
        values.count("num_experts" if values["num_experts"] is not None else "num_local_experts", 128, most=10_000),
        values.count("num_experts_per_tok", 8),
        values.count("moe_intermediate_size", 768),
        values.flag("norm_topk_prob", False),
    )
    window = _switched_window(values, 4096)
    return _qwen_experts(values, _in_windows(architecture, [SLIDING] * len(architecture.blocks), window), experts)
