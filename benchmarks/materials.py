"""A model of SmolLM2-135M's shape with random weights, and records as long as AdvertiseGen's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DEMO = Path(__file__).parent.parent / "core/src/sft/demo"
LAYERS = 30
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None, "torch_dtype": "float32",
}  # fmt: skip


def write_model(folder: Path, layers: int = LAYERS, vocabulary: int = 49152) -> Path:
    """Random weights in Hugging Face layout, with the tokenizer of the demo: its tokens are the first 2,048."""
    folder.mkdir(parents=True)
    rng, hidden, inner, kv = np.random.default_rng(0), 576, 1536, 192
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        linears = {"self_attn.q": (hidden, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden),
                   "self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden),
                   "mlp.down": (hidden, inner)}  # fmt: skip
        shapes.update({f"model.layers.{layer}.{name}_proj.weight": shape for name, shape in linears.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({**SHAPE, "num_hidden_layers": layers, "vocab_size": vocabulary}), encoding="utf-8"
    )
    settings = json.loads((DEMO / "model/tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = SHAPE["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copy(DEMO / "model/tokenizer.json", folder)
    return folder


def lengths(records: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and of answers: log-normal, with the medians and the spreads that AdvertiseGen has.

    They are those of its first 5,000 records in SmolLM2's tokens: 79 and 0.405 (24 more for the system prompt that
    SmolLM2's template adds) and 208 and 0.226.
    """
    rng = np.random.default_rng(seed)
    prompts, answers = 24 + rng.lognormal(np.log(79), 0.405, records), rng.lognormal(np.log(208), 0.226, records)
    return prompts.round().astype(int), answers.round().astype(int)


def write_records(folder: Path, records: int, model: Path, seed: int = 0) -> Path:
    """``train.json``: ``src`` and ``tgt`` of those lengths, drawn from the demo's words."""
    return write_words(folder, model, *lengths(records, seed), seed=seed)


def write_words(folder: Path, model: Path, prompts: np.ndarray, answers: np.ndarray, seed: int = 0) -> Path:
    """``train.json``: ``src`` and ``tgt`` of so many tokens, or one or two more, drawn from the demo's words."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = (DEMO / "data/train.json").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in lines for word in json.loads(line)["tgt"].split()})
    sizes = np.asarray([len(tokenizer.encode(" " + word).ids) for word in words])
    rng = np.random.default_rng(seed + 1)

    def text(tokens: int) -> str:
        chosen = rng.integers(0, len(words), tokens)
        enough = int(np.searchsorted(np.cumsum(sizes[chosen]), tokens)) + 1
        return " ".join(words[number] for number in chosen[:enough])

    with (folder / "train.json").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps({"src": text(prompt), "tgt": text(answer)}), file=file)
    return folder
