"""Quantization while weights stream in: what remains in float, what the model computes, and how much memory it took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft import hookspecs
from sft.plugins.registry import Plugins
from sft.plugins.requests import choose_plugins
from sft.settings.reading import build
from sft.testing import forward

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantizer(name: str, **options: Any) -> Any:
    active = Plugins.load([name], hookspecs)
    active.start(build(options, active).options)
    return active.hook.sft_quantizer(run=None)


def load(folder: Path, quantizer: Any = None) -> Any:
    from sft.models.loading import load_model, open_model

    return load_model(open_model(folder), quantizer)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf4", {}),
        ("nf4", {"qlora_weight_double_quant": True}),
        ("fp4", {"qlora_weight_blocksize": 32}),
        ("int8", {}),
        ("int4", {"weight_only_group_size": 8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["llama-untied", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_a_quantized_model_computes_with_the_dequantized_weights(
    paddle: Any, models: Path, case: str, name: str, options: dict[str, Any]
) -> None:
    """Biases (Qwen2) stay. Logits are up to 7 in size, so 1e-5 of that is 100 times float32's rounding."""
    from sft.models.layers import target_layers

    quantized, replaced = load(models / case, quantizer(name, **options)), load(models / case)
    plain = target_layers(replaced)
    for one, other in zip(target_layers(quantized), plain, strict=True):
        assert one.name == other.name
        other.layer.weight.set_value(one.layer.dequantize().contiguous())
        assert (one.layer.bias is None) == (other.layer.bias is None)
    ids = np.random.default_rng(1).integers(3, 128, (2, 20))
    found, expected = forward(quantized, ids), forward(replaced, ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(found - forward(load(models / case), ids)).max() > 1e-3


def test_no_linear_of_the_blocks_remains(paddle: Any, models: Path) -> None:
    model = load(models / "qwen2-untied", quantizer("nf4"))
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if any(part in LINEARS for part in name.split("."))]
    assert "lm_head.weight" in names
    assert not [layer for layer in model.model.layers.sublayers() if isinstance(layer, paddle.nn.Linear)]


def test_options_decide_what_is_stored(paddle: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    layer = quantizer("nf4").quantize("x", weight, None)
    assert (layer.blocksize, layer.double, list(layer.absmax.shape)) == (64, None, [32])
    layer = quantizer("nf4", qlora_weight_blocksize=128, qlora_weight_double_quant=True).quantize("x", weight, None)
    assert (layer.blocksize, layer.absmax) == (128, None)
    assert [list(tensor.shape) for tensor in layer.double] == [[16], [1], [256]]
    assert list(quantizer("int4", weight_only_group_size=16).quantize("x", weight, None).scales.shape) == [32, 4]
    assert list(quantizer("int8").quantize("x", weight, None).scales.shape) == [32, 1]


def test_trap_codes_are_those_of_the_transposed_weight(paddle: Any, bitsandbytes: dict[str, np.ndarray]) -> None:
    """Paddle's layout comes in, Hugging Face's is what is flattened."""
    weight = bitsandbytes["large.weight"].astype(np.float32)
    layer = quantizer("nf4").quantize("x", weight.T, None)
    np.testing.assert_array_equal(layer.codes.numpy(), bitsandbytes["large.nf4.codes"])
    layer = quantizer("nf4").quantize("x", np.ascontiguousarray(weight.T), None)
    np.testing.assert_array_equal(layer.codes.numpy(), bitsandbytes["large.nf4.codes"])


@pytest.mark.parametrize("algo", ["nf4", "fp4", "weight_only_int8", "weight_only_int4"])
def test_weight_quantize_algo_activates_the_plugin_of_that_value(algo: str) -> None:
    names, left = choose_plugins({"weight_quantize_algo": algo}, ())
    assert names == [algo.removeprefix("weight_only_")]
    assert left == {"weight_quantize_algo": algo}
    build(left, Plugins.load(names, hookspecs))


# --- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of a Llama model; what follows is in values."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def quantized(self) -> int:
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def unquantized(self) -> int:
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def largest(self) -> int:
        return max(self.vocabulary, self.intermediate) * self.hidden


LOAD = """
import sys
from pathlib import Path
from sft import hookspecs, runtime
from sft.plugins.registry import Plugins
from sft.settings.reading import build
runtime.prepare()
import paddle
from sft.models.loading import load_model, open_model
import sft_quant_nf4.layers
paddle.ones([2, 2]).matmul(paddle.ones([2, 2])).numpy()
active = Plugins.load(["nf4"], hookspecs)
active.start(build({}, active).options)
quantizer, source = active.hook.sft_quantizer(run=None), open_model(Path(sys.argv[1]))

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
model = load_model(source, quantizer)
print(kib("VmHWM") - before, kib("VmRSS") - before)
"""


def write_llama(folder: Path, sizes: Sizes) -> None:
    """A model in bfloat16, the same million random values over and over."""
    import ml_dtypes
    from safetensors.numpy import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": sizes.layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": sizes.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    hidden, wide, words = sizes.hidden, sizes.intermediate, sizes.vocabulary
    shapes = {"model.embed_tokens": (words, hidden), "lm_head": (words, hidden), "model.norm": (hidden,)}
    for number in range(sizes.layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}": (hidden, hidden) for name in LINEARS[:4]}
        shapes |= {f"{layer}.mlp.{name}": (wide, hidden) for name in LINEARS[4:6]}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, wide)}
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
    tensors = {f"{name}.weight": np.resize(values, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def measured(folder: Path, sizes: Sizes) -> tuple[int, int]:
    """The bytes that loading takes at its peak, and afterwards."""
    write_llama(folder, sizes)
    try:
        found = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=100, check=True
        )
    finally:
        (folder / "model.safetensors").unlink()  # pytest keeps what tests leave
    peak, held = found.stdout.split()[-2:]
    return int(peak) * 1024, int(held) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory by process")
@pytest.mark.parametrize(
    ("sizes", "empty"),
    [
        pytest.param(Sizes(1024, 2816, 9, 12288), None, id="large"),
        pytest.param(Sizes(1024, 2816, 3, 512), None, id="few-words", marks=pytest.mark.slow),
        pytest.param(Sizes(384, 1056, 60, 512), Sizes(64, 64, 60, 64), id="narrow", marks=pytest.mark.slow),
    ],
)
def test_loading_in_nf4_never_holds_the_model(paddle: Any, tmp_path: Path, sizes: Sizes, empty: Sizes | None) -> None:
    """Peak memory above that of a process that has imported paddle, the file's mapped pages included.

    In float32 a model alone would take twice the bound and more. Where blocks are many and narrow, their Python objects
    and numpy's scratch count beside the weights, and take what they take on this machine: as much as a model of as many
    blocks that is ``empty``, with next to no weights.
    """
    peak, held = measured(tmp_path, sizes)
    objects = 0 if empty is None else measured(tmp_path, empty)[0] - empty.quantized // 2
    bound = 4 * sizes.unquantized + 0.7 * sizes.quantized + 2 * 4 * sizes.largest + objects
    print(*(f"{what} {size / 2**20:.1f} MiB" for what, size in [("peak", peak), ("held", held), ("bound", bound)]))
    assert peak <= bound
    assert bound < 0.55 * 4 * (sizes.unquantized + sizes.quantized)
