"""Write the untrained base model: ``init_model.py FOLDER``, a small Llama with seeded random weights."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

VOCABULARY, HIDDEN, INNER, LAYERS = 2048, 192, 512, 6
HEADS, KEY_VALUE_HEADS, HEAD = 6, 2, 32
STANDARD_DEVIATION = 0.02
SEED = 7
END_OF_TEXT, END = 0, 2  # the ids that tokenizer.py gives to <|endoftext|> and <|im_end|>

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": STANDARD_DEVIATION,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": END_OF_TEXT,
    "torch_dtype": "float32",
}
GENERATION = {"do_sample": False, "max_new_tokens": 96, "eos_token_id": END, "pad_token_id": END_OF_TEXT}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, [out, in] for a projection, in the order in which they are drawn."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
                "self_attn.k_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
                "self_attn.v_proj": (KEY_VALUE_HEADS * HEAD, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }.items()
        }
    return tensors | {"model.norm.weight": (HIDDEN,)}


def weights() -> dict[str, NDArray[np.float32]]:
    """Normal weights; those that write to the residual stream are smaller by 1/sqrt(2 layers) (GPT-2)."""
    random = np.random.default_rng(SEED)
    drawn: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes().items():
        if len(shape) == 1:
            drawn[name] = np.ones(shape, np.float32)
            continue
        residual = "o_proj" in name or "down_proj" in name
        scale = STANDARD_DEVIATION / (math.sqrt(2 * LAYERS) if residual else 1.0)
        drawn[name] = np.float32(scale) * random.standard_normal(shape, np.float32)
    return drawn


def write(folder: Path) -> int:
    """Write the model directory and return its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = weights()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return sum(tensor.size for tensor in tensors.values())


def main() -> None:
    """Write the untrained model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{folder}: {write(folder):,} parameters")


if __name__ == "__main__":
    main()
