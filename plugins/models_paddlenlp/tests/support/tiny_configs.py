"""What the config.json of tiny checkpoints of each family says."""

from __future__ import annotations

from typing import Any

COMMON = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 2048, "torch_dtype": "float32"}
LATENT = {
    **COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    **{"model_type": "deepseek_v2", "num_hidden_layers": 3, "intermediate_size": 40, "moe_intermediate_size": 16},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"max_position_embeddings": 128, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    "rope_scaling": {
        **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1},
        **{"mscale": 0.7, "mscale_all_dim": 0.5},
    },
}
GLM = {
    **COMMON,
    **{"model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 2048, "seq_length": 128, "kv_channels": 8},
    **{"ffn_hidden_size": 40, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": {
        **COMMON,
        "architectures": ["QWenLMHeadModel"],
        **{"model_type": "qwen", "num_hidden_layers": 2, "intermediate_size": 80, "kv_channels": 8, "seq_length": 128},
        **{"use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "layer_norm_epsilon": 1e-6},
    },
    "chatglm": GLM,
    "chatglm-plain": {**GLM, "multi_query_group_num": 4, "add_qkv_bias": False},
    "deepseek-v2-lite": {**LATENT, "q_lora_rank": None},
    "deepseek-v2": {
        **LATENT,
        **{"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    },
}
