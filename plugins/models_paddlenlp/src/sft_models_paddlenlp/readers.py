"""From the ``config.json`` of each family to what PaddleNLP's config class takes. What its class would compute
otherwise than the checkpoint's own code is refused. Nothing here imports paddlenlp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sft


@dataclass(frozen=True, kw_only=True)
class PaddleNLPShape(sft.ModelShape):
    """A model that a class of PaddleNLP computes.

    Attributes:
        settings: What its config class takes.
    """

    settings: Mapping[str, Any]


def qwen(values: sft.Values) -> PaddleNLPShape:
    """Qwen 1, 1.8B to 72B. Its positions end at ``seq_length``: up to there neither its stretched rotary embedding nor
    its scaled attention does anything, and beyond it PaddleNLP computes them in evaluation alone."""
    hidden, heads, positions = _sizes(values, "seq_length", 2048)
    size = values.count("kv_channels", hidden // heads)
    if size * heads != hidden:
        raise values.wrong("kv_channels", f"hidden_size {hidden} / num_attention_heads {heads}")
    if values.number("rotary_pct", 1.0) != 1.0:
        raise values.wrong("rotary_pct", "1.0, all that PaddleNLP's class computes")
    inner = values.count("intermediate_size")
    if inner % 2:
        raise values.wrong("intermediate_size", "an even number: twice the width of its MLP")
    return _shape(
        values,
        positions,
        values.count("num_hidden_layers"),
        "transformer.h",
        seq_length=positions,
        kv_channels=size,
        intermediate_size=inner,
        layer_norm_epsilon=values.number("layer_norm_epsilon", 1e-6),
        rotary_emb_base=values.number("rotary_emb_base", 10000.0),
        no_bias=values.flag("no_bias", True),
        use_dynamic_ntk=False,
        use_logn_attn=False,
        num_attention_heads=heads,
    )


def chatglm(values: sft.Values) -> PaddleNLPShape:
    """ChatGLM2 and 3. ChatGLM 1 has the same ``model_type`` and other layers."""
    if values["position_encoding_2d"] or values["inner_hidden_size"] is not None:
        raise sft.UsageError(
            f"{values.where} is a ChatGLM of the first generation, whose layers are not computed here."
        )
    layers = values.count("num_layers" if values["num_layers"] is not None else "num_hidden_layers")
    hidden, heads, positions = _sizes(values, "seq_length", 2048)
    size = values.count("kv_channels", 128)
    if size * heads != hidden:
        raise values.wrong("kv_channels", f"hidden_size {hidden} / num_attention_heads {heads}")
    if values.number("rope_ratio", 1.0) != 1.0:
        raise values.wrong("rope_ratio", "1, all that PaddleNLP's class computes")
    if not values.flag("rmsnorm", True):
        raise values.wrong("rmsnorm", "true, all that PaddleNLP's class computes")
    groups = values.count("multi_query_group_num", 1) if values.flag("multi_query_attention", True) else heads
    return _shape(
        values,
        positions,
        layers,
        "transformer.encoder.layers",
        vocabulary="padded_vocab_size" if values["padded_vocab_size"] is not None else "vocab_size",
        max_sequence_length=positions,
        kv_channels=size,
        ffn_hidden_size=values.count("ffn_hidden_size"),
        layernorm_epsilon=values.number("layernorm_epsilon", 1e-5),
        apply_residual_connection_post_layernorm=values.flag("apply_residual_connection_post_layernorm", False),
        post_layer_norm=values.flag("post_layer_norm", True),
        add_bias_linear=values.flag("add_bias_linear", False),
        add_qkv_bias=values.flag("add_qkv_bias", False),
        multi_query_group_num=groups,
        num_attention_heads=heads,
    )


def deepseek_v2(values: sft.Values) -> PaddleNLPShape:
    """DeepSeek-V2 and V2-Lite: latent attention, and experts beside shared ones."""
    scaling = values["rope_scaling"]
    if not isinstance(scaling, dict) or scaling.get("type", scaling.get("rope_type")) != "yarn":
        raise values.wrong("rope_scaling", "an object of type yarn, all that PaddleNLP's class computes")
    values.word("hidden_act", {"silu": "silu"}, "silu")
    values.refuse("quantization_config")
    heads, positions = values.count("num_attention_heads"), values.count("max_position_embeddings", 2048)
    query_rank = None if values["q_lora_rank"] is None else values.count("q_lora_rank")
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "intermediate_size")
    experts: dict[str, Any] = {"n_routed_experts": None, "n_shared_experts": None}
    experts.update({name: values.count(name) for name in names})
    if values["n_routed_experts"] is not None:
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
            experts[name] = values.count(name)
        experts["n_shared_experts"] = values.count("n_shared_experts") if values["n_shared_experts"] else None
        method = values.word(
            "topk_method", {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}, "greedy"
        )
        values.word("scoring_func", {"softmax": "softmax"}, "softmax")
        if method != "greedy":
            experts["n_group"], experts["topk_group"] = values.count("n_group"), values.count("topk_group")
        experts.update(
            topk_method=method,
            moe_layer_freq=values.count("moe_layer_freq", 1),
            first_k_dense_replace=values.count("first_k_dense_replace", 0, least=0),
            norm_topk_prob=values.flag("norm_topk_prob", False),
            routed_scaling_factor=values.number("routed_scaling_factor", 1.0),
        )
    return _shape(
        values,
        positions,
        values.count("num_hidden_layers"),
        "model.layers",
        max_position_embeddings=positions,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=query_rank,
        rope_theta=values.number("rope_theta", 10000.0),
        rope_scaling={"type": "yarn", **{key: one for key, one in scaling.items() if key not in ("type", "rope_type")}},
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        attention_bias=values.flag("attention_bias", False),
        aux_loss_alpha=0.0,
        **experts,
    )


def _sizes(values: sft.Values, positions: str, default: int) -> tuple[int, int, int]:
    """Hidden size, heads, and the longest document by the config's name for it."""
    return values.count("hidden_size"), values.count("num_attention_heads"), values.count(positions, default)


def _shape(
    values: sft.Values,
    positions: int,
    layers: int,
    block_names: str,
    vocabulary: str = "vocab_size",
    **settings: Any,
) -> PaddleNLPShape:
    if values.flag("tie_word_embeddings", False):
        raise values.wrong("tie_word_embeddings", "false, all that PaddleNLP's class computes")
    size, hidden = values.count(vocabulary), values.count("hidden_size")
    return PaddleNLPShape(
        vocabulary=size,
        hidden=hidden,
        positions=positions,
        blocks=(sft.Block(rotary=None),) * layers,
        tied=False,
        block_names=block_names,
        settings={**settings, "vocab_size": size, "hidden_size": hidden, "num_hidden_layers": layers},
    )
