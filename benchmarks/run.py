"""A LoRA step of sft beside the same step in PaddleNLP 3.0.0b4, in one process, turn by turn.

    python benchmarks/run.py [--layers 6] [--tokens 512] [--targets 128] [--steps 8]

The model has SmolLM2-135M's shape (hidden 576, 9 heads, 3 key/value heads, vocabulary 49,152) with random weights
and fewer layers. Both sides do forward, backward and AdamW on one row; PaddleNLP as its run_finetune.py does it
(LoRAModel, its criterion on full logits), sft through its own loss, attention and optimizer. Prints the median
seconds of a step of each, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sft import runtime

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def write_model(folder: Path, layers: int) -> None:
    """Random weights in Hugging Face layout."""
    from safetensors.numpy import save_file

    rng, hidden, inner, kv = np.random.default_rng(0), 576, 1536, 192
    shapes = {"model.embed_tokens.weight": (49152, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        linears = {"self_attn.q": (hidden, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden),
                   "self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden),
                   "mlp.down": (hidden, inner)}  # fmt: skip
        shapes.update({f"model.layers.{layer}.{name}_proj.weight": shape for name, shape in linears.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}), encoding="utf-8")


def sft_step(folder: Path, ids: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    from sft import target_layers
    from sft.models.layers import trainable
    from sft.models.loading import load_model, open_model
    from sft.seams import Batch
    from sft.settings.arguments import TrainingArguments
    from sft.training.loss import batch_loss
    from sft.training.optimizer import Optimizer, clip_factor, default_groups
    from sft.training.strategy import SingleProcess
    from sft_peft_lora.layer import LoraLinear
    from sft_peft_lora.lora import initialize

    model = load_model(open_model(folder))
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for target in target_layers(model):
        layer = LoraLinear(target.layer, target.in_features, target.out_features, 8, 2.0, 0.0)
        initialize(layer, np.random.default_rng(0))
        target.replace(layer)
    optimizer = Optimizer(default_groups(trainable(model), 0.0), TrainingArguments())
    length = ids.shape[1]
    batch = Batch(ids, labels, np.arange(length)[None], np.full((1, 1, length, 1), length, np.int32), ((length,),))
    model.train()

    def step() -> float:
        loss = batch_loss(model, batch)
        (loss / batch.target_tokens).backward()
        optimizer.step(1e-4, clip_factor(SingleProcess().grad_norm(optimizer.parameters), 1.0))
        return float(loss) / batch.target_tokens

    return step


def paddlenlp_step(folder: Path, ids: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    import paddle
    from paddlenlp.peft import LoRAConfig, LoRAModel
    from paddlenlp.transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(str(folder), convert_from_torch=True, dtype="float32")
    targets = [f".*{name}_proj.*" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = LoRAModel(base, LoRAConfig(target_modules=targets, r=8, lora_alpha=16, dtype="float32"))
    model.mark_only_lora_as_trainable()
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=parameters, weight_decay=0.0, grad_clip=clip)
    inputs, targets_ = paddle.to_tensor(ids), paddle.to_tensor(labels)
    model.train()

    def step() -> float:
        output: Any = model(input_ids=inputs, labels=targets_)
        loss = output[0] if isinstance(output, tuple) else output
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    print(runtime.prepare())
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 49152, (1, arguments.tokens))
    labels = np.full_like(ids, -100)
    labels[0, -arguments.targets :] = rng.integers(0, 49152, arguments.targets)
    seconds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), arguments.layers)
        steps = {"sft": sft_step(Path(scratch), ids, labels), "paddlenlp": paddlenlp_step(Path(scratch), ids, labels)}
        for step in steps.values():
            step()
        for _ in range(arguments.steps):
            for name, step in steps.items():
                began = time.perf_counter()
                losses[name] = step()
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:<10} {statistics.median(values):.3f} s a step (median of {len(values)}), loss {losses[name]:.4f}")
    ratio = statistics.median(seconds["paddlenlp"]) / statistics.median(seconds["sft"])
    print(f"paddlenlp / sft = {ratio:.2f}")


if __name__ == "__main__":
    main()
