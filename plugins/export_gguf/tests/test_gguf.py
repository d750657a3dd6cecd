"""Files for llama.cpp: what llama.cpp itself computes from them, and what the gguf library reads in them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import forward, load, needs

CASES = (
    *("llama", "llama-untied", "llama-headdim", "llama3", "llama-biased", "llama-linear", "llama-yarn", "mistral"),
    *("qwen2", "qwen2-tied", "qwen3", "smollm3", "granite", "olmo2"),
    *("mixtral", "qwen2-moe", "qwen3-moe", "mistral-prefixed", "gemma-plain", "gemma2", "gemma3"),
)
QUICK = ("llama3", "qwen2-moe", "mistral-prefixed")
TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def slowly(names: tuple[str, ...], quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    """Of the token after ``ids``, float64 [V]."""
    logits = forward(model, np.array([ids]))[0, -1].astype(np.float64)
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def exported(model: Path, output: Path, *say: Callable[[str], None], **options: Any) -> Path:
    from sft.inference.export import export

    (path,) = export(str(model), None, "gguf", output, *(say or (lambda text: None,)), options=options)
    return path


# --- llama.cpp ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", slowly(CASES, QUICK))
def test_llama_cpp_computes_what_sft_computes(
    cases: ModuleType, answers: dict[str, Any], tmp_path: Path, case: str
) -> None:
    """From the very file that is written here, and of the same text: equal tokens, and log-probabilities equal to
    float32's noise (llama.cpp gives six digits)."""
    answer = answers[f"{case} f32"]
    assert cases.digest(cases.write(case, "f32", tmp_path)) == answer["digest"], "make_answers.py must be run again"
    model, tokenizer = load(tmp_path / "model"), sft_tokenizer(tmp_path / "model")
    # llama.cpp looks GELU up in a table of 16-bit numbers; Gemma is the one family that has it.
    noise = 4e-3 if case.startswith("gemma") else 2e-5
    for ids, after in zip(cases.IDS, answer["after"], strict=True):
        np.testing.assert_allclose(after, log_probabilities(model, ids), rtol=0, atol=noise)
    for text, tokens in zip(cases.texts_of(case), answer["tokens"], strict=True):
        assert tokenizer.with_bos(tokenizer.encode(text)) == tokens


@needs("lora")
@pytest.mark.parametrize("name", ["llama-lora", pytest.param("qwen2-lora", marks=pytest.mark.slow)])
def test_llama_cpp_puts_an_adapter_over_its_base(
    cases: ModuleType, answers: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """With ranks and α of several kinds, and updates of embedding and head; from the very file that is written here."""
    answer, (_, adapter) = answers[f"{name} alone"], cases.ADAPTERS[name]
    _, path = cases.write_adapter(name, tmp_path)
    assert cases.digest(path) == answer["digest"], "make_answers.py must be run again"
    model, plain = load(tmp_path / "model", adapter), load(tmp_path / "model")
    for ids, after in zip(cases.IDS, answer["after"], strict=True):
        np.testing.assert_allclose(after, log_probabilities(model, ids), rtol=0, atol=5e-5)
        assert np.abs(np.array(after) - log_probabilities(plain, ids)).max() > 0.05


@needs("lora")
@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (None, {}, "There is no adapter to write alone; name its folder"),
        ("llama-lora-patterns", {"gguf_type": "q8_0"}, "gguf_type q8_0 is none of an adapter alone; give one of f32"),
        ("llama-lora-patterns", {"gguf_system": "s"}, "gguf_system does nothing with --to gguf-lora"),
        ("llama-lora-saved", {}, "is more than updates of low rank: .* trained too"),
        ("llama-lora-rows", {}, "is more than updates of low rank: model.embed_tokens"),
        ("llama-dora-all-linear", {}, "is more than updates of low rank, as plugin lora reads it"),
        ("llama-lora-outer", {}, "an embedding that is lm_head too"),
        ("mixtral", {}, "The adapter changes experts"),
    ],
)
def test_an_adapter_that_no_file_of_its_own_can_hold_is_refused(
    cases: ModuleType, tmp_path: Path, adapter: str | None, options: dict[str, Any], message: str
) -> None:
    from sft.inference.export import export

    case = "mixtral" if adapter == "mixtral" else "llama"
    folder = cases.prepare(case, tmp_path / "model")
    path = None if adapter is None else cases.PEFT / ("written/mixtral" if adapter == "mixtral" else adapter)
    with pytest.raises(sft.UsageError, match=message):
        export(str(folder), path, "gguf-lora", tmp_path / "out", lambda text: None, options=options)
    assert not (tmp_path / "out").exists()


def sft_tokenizer(folder: Path) -> Any:
    from sft.data.tokenizer import Tokenizer

    return Tokenizer(folder)


@pytest.mark.parametrize("kind", slowly(TYPES, ("q8_0",)))
def test_llama_cpp_reads_every_type(cases: ModuleType, answers: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """Against sft's model with the weights that are in the file. llama.cpp rounds what it multiplies them with, to 8
    bits in blocks or to the type's own, which moves the result; another block order, or scale, would move it far."""
    answer = answers[f"llama {kind}"]
    path = cases.write("llama", kind, tmp_path)
    assert cases.digest(path) == answer["digest"], "make_answers.py must be run again"
    exact = load(tmp_path / "model")
    write_back(path, tmp_path / "model")
    rounded = load(tmp_path / "model")
    found, expected = np.array(answer["after"][0]), log_probabilities(rounded, cases.IDS[0])
    moved = np.abs(found - expected).max()
    assert moved < {"f16": 0.02, "bf16": 0.1}.get(kind, 0.25), moved
    if kind.startswith(("q4", "q5")):  # the rounding of the weights is larger than that of what they meet
        assert moved < 0.5 * np.abs(found - log_probabilities(exact, cases.IDS[0])).max()


def write_back(path: Path, folder: Path) -> None:
    """Give the model in ``folder`` the weights of a GGUF file."""
    values, tensors = {}, load_file(folder / "model.safetensors")
    for tensor in gguf.GGUFReader(path).tensors:
        values[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    config = json.loads((folder / "config.json").read_text())
    for name, array in tensors.items():
        found = values[theirs(name)].reshape(array.shape)
        tensors[name] = np.ascontiguousarray(separate(name, found, config)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is in the file ------------------------------------------------------------------------------------

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
"""Norms that are applied to what a part of a block gives, and not to what it gets."""


def theirs(name: str, behind: bool = False) -> str:
    """What GGUF's specification calls a tensor of Hugging Face's Llama; or of OLMo 2, whose norms stand ``behind``."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in (*outer, "lm_head.weight"):
        return outer.get(name, "output.weight")
    name = re.sub(r"\.(experts)\.\d+\.", r".\1.", name.replace("block_sparse_moe", "mlp"))
    for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f".{old}.", f".{new}.")
    _, _, block, *middle, kind = name.split(".")
    names = {**NAMES, **EXPERTS, **(BEHIND if behind else {})}
    return f"blk.{block}.{names['.'.join(middle)]}.{kind}"


def separate(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The rows of q and k of Llama in Hugging Face's order: those of a head's first halves of pairs come first. Of
    Gemma's norms one less."""
    if config["model_type"].startswith("gemma") and "norm" in name:
        return np.asarray(array - np.float32(1.0))
    if config["model_type"] in ("llama", "mistral", "mixtral", "smollm3", "granite") and (
        "q_proj" in name or "k_proj" in name
    ):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        size = array.shape[0] // heads
        order = [head * size + 2 * pair + half for head in range(heads) for half in (0, 1) for pair in range(size // 2)]
        return np.asarray(array[order])
    return array


@pytest.mark.parametrize("case", slowly(CASES, ("llama3",)))
def test_every_tensor_is_in_the_file_bit_by_bit(cases: ModuleType, tmp_path: Path, case: str) -> None:
    reader = gguf.GGUFReader(cases.write(case, "f32", tmp_path))
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    stored = {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    found = {tensor.name: tensor.data.reshape(tensor.shape[::-1]) for tensor in reader.tensors}
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (case == "llama3")
    behind = case in ("olmo2", "gemma2", "gemma3")
    called = {name: theirs(name, behind) for name in stored}
    assert sorted(found) == sorted(set(called.values()))
    for name, array in stored.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        own = found[called[name]] if expert is None else found[called[name]][int(expert[1])]
        there = separate(name, own.reshape(array.shape), config)
        if config["model_type"].startswith("gemma"):  # of whose norms 1 is added, and taken away again
            np.testing.assert_allclose(there, array, atol=1e-7, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(there, array, name)

    def said(key: str) -> Any:
        return reader.fields[key].contents()

    arch = said("general.architecture")
    arches = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    arches |= {"gemma3_text": "gemma3"}
    assert arch == arches.get(config["model_type"], config["model_type"])
    assert said(f"{arch}.block_count") == config["num_hidden_layers"]
    assert said(f"{arch}.attention.head_count_kv") == config["num_key_value_heads"]
    assert said(f"{arch}.context_length") == sft.open_model(folder).architecture.positions
    if case not in cases.SENTENCEPIECE:
        assert said("tokenizer.ggml.tokens")[5] == "&"
        return
    tokens, scores, types = (said(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    assert said("tokenizer.ggml.model") == "llama"
    assert said("tokenizer.ggml.add_space_prefix") is (case == "mistral-prefixed")
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    pieces = ["".join(pair) for pair in merges]
    order = [scores[tokens.index(piece)] for piece in pieces if piece in tokens and types[tokens.index(piece)] == 1]
    assert len(order) > 20
    assert order == sorted(order, reverse=True)
    assert {token for token, kind in zip(tokens, types, strict=True) if kind == 6} == {
        f"<0x{n:02X}>" for n in range(256)
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_without_a_type_nothing_is_rounded(cases: ModuleType, tmp_path: Path, dtype: str) -> None:
    folder = cases.prepare("qwen2", tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    narrow = {
        name: array.astype(np.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16)
        for name, array in stored.items()
    }
    save_file(narrow, folder / "model.safetensors", metadata={"format": "pt"})
    for tensor in gguf.GGUFReader(exported(folder, tmp_path / "out")).tensors:
        name = next(name for name in stored if theirs(name) == tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(stored[name].shape)
        np.testing.assert_array_equal(values, narrow[name].astype(np.float32))
        assert tensor.tensor_type.name == (
            "F32" if values.ndim == 1 else {"float32": "F32", "float16": "F16"}.get(dtype, "BF16")
        )


def test_blocks_of_8_bits_have_the_scale_of_their_largest_value(cases: ModuleType, tmp_path: Path) -> None:
    """The formula of ggml's Q8_0 in float64: d = max |x| / 127 in float16, and x / d to the nearest whole number."""
    said: list[str] = []
    folder = cases.prepare("qwen2", tmp_path / "model")
    reader = gguf.GGUFReader(exported(folder, tmp_path / "out", said.append, gguf_type="q8_0"))
    stored, blocks = load_file(folder / "model.safetensors"), 0
    for tensor in reader.tensors:
        if tensor.tensor_type is not gguf.GGMLQuantizationType.Q8_0:
            continue
        name = next(name for name in stored if theirs(name) == tensor.name)
        rows = np.asarray(tensor.data).reshape(-1, 34)
        scales, codes = rows[:, :2].copy().view(np.float16)[:, 0], rows[:, 2:].copy().view(np.int8)
        values = stored[name].astype(np.float64).reshape(-1, 32)
        exact = np.abs(values).max(axis=1) / 127
        np.testing.assert_array_equal(scales, exact.astype(np.float16))
        assert np.abs(codes - values / exact[:, None]).max() <= 0.5 + 1e-4
        blocks += len(rows)
    assert blocks > 500
    assert "matrices are f16 and not q8_0, whose blocks of 32 values do not divide their rows" in " ".join(said)


# --- what is said, and refused ------------------------------------------------------------------------------


def test_what_the_file_cannot_say_is_said(cases: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    folder = cases.prepare("mistral", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 24}))
    reader = gguf.GGUFReader(exported(folder, tmp_path / "out", said.append))
    assert reader.fields["llama.context_length"].contents() == 24
    (note,) = said
    assert "no sliding window, so the file says that its context is the window, 24 tokens" in note
    said.clear()
    exported(cases.prepare("qwen2", tmp_path / "composing"), tmp_path / "out2", said.append)
    assert "llama.cpp does not compose letters as this tokenizer does (NFC)" in " ".join(said)


def test_what_llama_cpp_does_not_compute_is_refused(models: Path, cases: ModuleType, tmp_path: Path) -> None:
    families = models.parent / "families"
    wrong = {
        families / "llama-dynamic": r"GGUF file of llama cannot describe this model's rotary embedding \(dynamic, ",
        families / "phi3": "Models of type phi3 cannot be written as GGUF here .those that can: llama, ",
        families / "gemma2": r"llama\.cpp computes gemma2 with attention_scale 0\.25, and this model has 0\.204",
    }
    for model, message in wrong.items():
        folder = tmp_path / model.name
        shutil.copytree(model, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(models / "llama-tied-gqa" / name, folder / name)
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
        with pytest.raises(sft.UsageError, match=message):
            exported(folder, tmp_path / "out")
    others: dict[str, tuple[dict[str, Any], str]] = {
        "smollm3": (
            {"no_rope_layers": None, "no_rope_layer_interval": 2},
            "turns queries and keys of all blocks but one in 4, ",
        ),
        "gemma3": ({"layer_types": None, "sliding_window_pattern": 2}, "has one window in all blocks but one in 6, "),
    }
    for case, (changed, message) in others.items():
        folder = cases.prepare(case, tmp_path / case)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(sft.UsageError, match=message):
            exported(folder, tmp_path / "out")
    biased = cases.prepare("qwen3", tmp_path / "biased")
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(
        sft.UsageError, match=r"llama\.cpp computes qwen3 with attention_bias False, and this model has True"
    ):
        exported(biased, tmp_path / "out")
    large = cases.prepare("llama", tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(1e7)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sft.UsageError, match="which float16 does not hold; give --gguf_type bf16 or f32"):
        exported(large, tmp_path / "out", gguf_type="f16")
    with pytest.raises(sft.UsageError, match="gguf_type"):
        exported(large, tmp_path / "out", gguf_type="q4_k_m")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
            "BPE that cuts words by",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "BPE that cuts words by .*Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "BPE with normalizer .*Lowercase"),
        ({"decoder": {"type": "Fuse"}}, "BPE that is not byte-level BPE"),
        ({"model": {"ignore_merges": True}}, "and never cuts tokens"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_follow_is_refused(
    cases: ModuleType, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = cases.prepare("llama", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content.update({key: {**content[key], **value} if key == "model" else value for key, value in change.items()})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(sft.UsageError, match=f"The tokenizer is .*{message}"):
        exported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
