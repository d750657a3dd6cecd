"""Model directories: what is loaded computes what transformers computes, and what would not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.models import source as sources
from sft.models.config import paddle_config

CASES = ("llama-untied", "llama-tied-gqa", "llama3-scaled", "qwen2-untied", "qwen2-tied-sharded")

# float32 noise between two implementations is 1e-5 at logits of up to 7; the smallest mistake that
# make_models.py looked for moves a logit by 0.05.
TOLERANCE = 1e-4


@pytest.fixture
def variant(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case; keyword arguments change its config.json, None removes a key."""

    def make(case: str, **changes: Any) -> Path:
        folder = tmp_path / case
        shutil.copytree(models / case, folder)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder: Path, quantizer: Any = None) -> Any:
    from sft.models.loading import load_model, open_model

    return load_model(open_model(folder), quantizer)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = load_file(folder / "reference.safetensors")
    return found["input_ids"], found["logits"]


def own_logits(model: Any, input_ids: np.ndarray) -> np.ndarray:
    """Through PaddleNLP's own forward."""
    import paddle

    ids = paddle.to_tensor(input_ids)
    with paddle.no_grad():
        found = model(input_ids=ids, attention_mask=paddle.ones_like(ids))
    return (found[0] if isinstance(found, tuple) else found).numpy()


def backend_logits(model: Any, input_ids: np.ndarray, position_ids: np.ndarray | None = None) -> np.ndarray:
    """Through the installed attention backend, as training computes them."""
    import paddle

    from sft.models.attention import hidden_states

    if position_ids is None:
        position_ids = np.tile(np.arange(input_ids.shape[1]), (len(input_ids), 1))
    one_document = tuple((input_ids.shape[1],) for _ in input_ids)
    ends = np.full((len(input_ids), 1, input_ids.shape[1], 1), input_ids.shape[1], np.int32)
    batch = sft.Batch(input_ids, np.full_like(input_ids, -100), position_ids, ends, one_document)
    with paddle.no_grad():
        return model.lm_head(hidden_states(model, batch)).numpy()


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())


# --- logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_paddlenlps_own_forward_gives_the_logits_of_transformers(paddle: Any, models: Path, case: str) -> None:
    input_ids, expected = reference(models / case)
    assert largest_difference(own_logits(load(models / case), input_ids), expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_installed_backend_gives_the_logits_of_transformers(paddle: Any, models: Path, case: str) -> None:
    from sft.models.attention import DefaultAttention, install

    input_ids, expected = reference(models / case)
    model = load(models / case)
    install(model, DefaultAttention())
    assert largest_difference(backend_logits(model, input_ids), expected) < TOLERANCE


def test_a_loaded_model_is_float32_and_in_evaluation_mode(paddle: Any, models: Path) -> None:
    model = load(models / "qwen2-tied-sharded")  # bfloat16 in its files
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.float32}
    assert not any(layer.training for layer in model.sublayers(include_self=True))


def test_rotary_tables_are_shared_by_all_layers(paddle: Any, models: Path) -> None:
    model = load(models / "llama3-scaled")
    tables = [layer.rotary_emb for layer in model.sublayers() if hasattr(layer, "rotary_emb")]
    assert len(tables) == 2
    assert tables[0] is tables[1]


# --- the rotary embedding's spellings -----------------------------------------------------------------------


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": None},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": None},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "rope_parameters": None},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
    ids=["transformers-4", "type", "theta-in-scaling", "theta-beside-parameters"],
)
def test_every_spelling_of_a_scaling_gives_the_same_config_and_logits(
    paddle: Any, models: Path, variant: Callable[..., Path], spelling: dict[str, Any]
) -> None:
    folder = variant("llama3-scaled", **spelling)
    _, expected = paddle_config(config_of(models / "llama3-scaled"), "here")
    _, found = paddle_config(config_of(folder), "here")
    assert found.to_dict() == expected.to_dict()
    input_ids, logits = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), logits) < TOLERANCE


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-tied-sharded"])
def test_a_plain_theta_is_read_from_either_spelling(paddle: Any, models: Path, case: str) -> None:
    values = config_of(models / case)
    theta = values["rope_parameters"]["rope_theta"]
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    _, expected = paddle_config(values, "here")
    _, found = paddle_config({**old, "rope_theta": theta, "rope_scaling": None}, "here")
    assert expected.rope_theta == theta != 10000.0
    assert found.to_dict() == expected.to_dict()


def test_without_any_theta_it_is_10000_as_in_transformers(paddle: Any, models: Path) -> None:
    values = {key: value for key, value in config_of(models / "llama-untied").items() if key != "rope_theta"}
    assert paddle_config(values, "here")[1].rope_theta == 10000.0


def test_a_linear_scaling_divides_positions(paddle: Any, models: Path, variant: Callable[..., Path]) -> None:
    """Positions twice as far apart under factor 2 are the plain model's positions."""
    from sft.models.attention import DefaultAttention, install

    folder = variant("llama-untied", rope_scaling={"type": "linear", "factor": 2.0})
    input_ids, expected = reference(folder)
    model = load(folder)
    install(model, DefaultAttention())
    length = input_ids.shape[1]
    # PaddleNLP's tables reach as far as the row, so it is made twice as long; causality hides the second half.
    twice = np.concatenate([input_ids, input_ids], axis=1)
    plain, apart = (np.concatenate([step * np.arange(length), np.arange(length)]) for step in (1, 2))
    found = backend_logits(model, twice, np.tile(apart, (len(twice), 1)))[:, :length]
    assert largest_difference(found, expected) < TOLERANCE
    found = backend_logits(model, twice, np.tile(plain, (len(twice), 1)))[:, :length]
    assert largest_difference(found, expected) > 0.05


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_explicit_head_dim_is_refused(models: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"llama-headdim: head_dim = 16 is ignored by PaddleNLP"):
        paddle_config(config_of(models / "llama-headdim"), models / "llama-headdim")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama-untied", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ("llama-tied-gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ("qwen2-untied", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "knows default"),
        ("llama-tied-gqa", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        ("llama-tied-gqa", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of a"),
        ("qwen2-untied", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama-untied", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama-untied", {"attention_bias": True}, "attention_bias = True"),
        ("llama-untied", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama-untied", {"quantization_config": {"bits": 4}}, "quantization_config = "),
        ("llama-untied", {"model_type": "mamba"}, "model_type 'mamba' has not been verified.*llama, qwen2"),
        ("llama-untied", {"model_type": None}, "model_type None"),
        ("llama-untied", {"hidden_size": None}, r"config\.json must give hidden_size as a whole number"),
        ("llama-untied", {"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_a_setting_that_paddlenlp_would_ignore_is_refused_by_name(
    models: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(sft.UsageError, match=rf"^the-model: .*{message}"):
        paddle_config({**config_of(models / case), **changes}, "the-model")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "is not valid JSON"), ("[]", "must hold one JSON object")]
)
def test_a_damaged_config_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    from sft.models.loading import open_model

    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(sft.UsageError, match=message):
        open_model(tmp_path)


# --- tensors that do not fit --------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks tensors {NORM};"),
        (lambda t: t.update({"model.extra": t[NORM]}), r"holds unknown tensors model\.extra;"),
        (lambda t: t.update({DOWN: t[DOWN].T.copy()}), rf"tensor {DOWN} has shape \[48, 32\]"),
        (lambda t: t.update({NORM: t[NORM][:-1].copy()}), rf"tensor {NORM} has shape \[31\]"),
        (lambda t: [t.pop(key) for key in list(t) if "mlp" in key], r"lacks tensors .*down_proj.* and 3 more;"),
    ],
    ids=["missing", "left-over", "transposed", "short", "many"],
)
def test_tensors_that_do_not_fit_are_named(
    paddle: Any, variant: Callable[..., Path], change: Callable[..., Any], message: str
) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, change)
    with pytest.raises(sft.UsageError, match=message):
        load(folder)


def test_a_missing_lm_head_is_an_error_unless_it_is_tied(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(sft.UsageError, match=r"lacks tensors lm_head\.weight"):
        load(folder)


def test_a_tied_matrix_that_is_stored_twice_is_accepted(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-tied-gqa")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    input_ids, expected = reference(folder)
    model = load(folder)
    assert largest_difference(own_logits(model, input_ids), expected) < TOLERANCE
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_rotary_frequencies_of_older_files_are_passed_over(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    input_ids, expected = reference(folder)
    assert largest_difference(own_logits(load(folder), input_ids), expected) < TOLERANCE


def test_a_missing_shard_is_named(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("qwen2-tied-sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(sft.UsageError, match=r"lacks model-00002-of-00002\.safetensors, named by model\.safetensors\."):
        load(folder)


def test_a_folder_without_weights_says_what_it_needs(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    (folder / "model.safetensors").unlink()
    with pytest.raises(sft.UsageError, match=r"has no weights; it needs model\.safetensors"):
        load(folder)


def test_a_cut_off_file_is_named(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sft.UsageError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)


# --- Paddle's layout ----------------------------------------------------------------------------------------


def in_paddle_layout(folder: Path) -> dict[str, np.ndarray]:
    """A case's tensors as PaddleNLP names and stores them, written out independently of sft."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        for name, tensor in load_file(path).items():
            linear = name.endswith("_proj.weight") or name == "lm_head.weight"
            renamed = name.replace("model.", config_of(folder)["model_type"] + ".", 1)
            found[renamed] = np.ascontiguousarray(tensor.T) if linear else tensor
    return found


def write_safetensors(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors")


def write_pdparams(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    state = {name: paddle.to_tensor(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    paddle.save(state, str(folder / "model_state.pdparams"))


def write_bfloat16_pdparams(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    state = {name: paddle.to_tensor(tensor.astype(np.float32)).astype("bfloat16") for name, tensor in tensors.items()}
    paddle.save(state, str(folder / "model_state.pdparams"))


def write_uint16_safetensors(paddle: Any, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """As PaddleNLP's ``save_pretrained`` writes bfloat16."""
    bits = {name: tensor.astype(ml_dtypes.bfloat16).view(np.uint16) for name, tensor in tensors.items()}
    save_file(bits, folder / "model.safetensors", metadata={"format": "np"})


@pytest.mark.parametrize("case", ["llama-untied", "llama-tied-gqa", "qwen2-untied"])
@pytest.mark.parametrize("write", [write_safetensors, write_pdparams])
def test_paddles_layout_gives_the_same_logits(
    paddle: Any, models: Path, tmp_path: Path, case: str, write: Callable[..., None]
) -> None:
    shutil.copy(models / case / "config.json", tmp_path)
    write(paddle, in_paddle_layout(models / case), tmp_path)
    input_ids, expected = reference(models / case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


@pytest.mark.parametrize("write", [write_bfloat16_pdparams, write_uint16_safetensors])
def test_paddles_bfloat16_is_not_taken_for_whole_numbers(
    paddle: Any, models: Path, tmp_path: Path, write: Callable[..., None]
) -> None:
    """numpy's stand-in for bfloat16 in Paddle's files is uint16. This case's weights are exact in bfloat16."""
    case = models / "qwen2-tied-sharded"
    shutil.copy(case / "config.json", tmp_path)
    write(paddle, in_paddle_layout(case), tmp_path)
    input_ids, expected = reference(case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


def test_paddles_sharded_pdparams_load(paddle: Any, models: Path, tmp_path: Path) -> None:
    case = models / "llama-untied"
    shutil.copy(case / "config.json", tmp_path)
    tensors = list(in_paddle_layout(case).items())
    weight_map = {}
    for part, chosen in enumerate((tensors[:7], tensors[7:])):
        file = f"model_state-{part}.pdparams"
        paddle.save({name: paddle.to_tensor(tensor) for name, tensor in chosen}, str(tmp_path / file))
        weight_map.update({name: file for name, _ in chosen})
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": weight_map}))
    input_ids, expected = reference(case)
    assert largest_difference(own_logits(load(tmp_path), input_ids), expected) < TOLERANCE


# --- the quantizer's seam -----------------------------------------------------------------------------------


class Rounding:
    """A toy quantizer: 8 bits a weight with one scale, for every Linear but o_proj. Remembers what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def quantize(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Any | None:
        self.given[name] = (weight, bias)
        return None if name.endswith("o_proj") else rounded_linear(weight, bias)

    @staticmethod
    def codes(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
        scale = np.float32(np.abs(weight).max() / 127)
        return np.rint(weight / scale).astype(np.int8), scale


def rounded_linear(weight: np.ndarray, bias: np.ndarray | None) -> Any:
    import paddle

    class RoundedLinear(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = weight.shape
            codes, self.scale = Rounding.codes(weight)
            self.register_buffer("codes", paddle.to_tensor(codes))
            self.register_buffer("offset", None if bias is None else paddle.to_tensor(bias))

        def dequantize(self) -> Any:
            return self.codes.astype("float32") * float(self.scale)

        def forward(self, x: Any) -> Any:
            return paddle.nn.functional.linear(x, self.dequantize(), self.offset)

    return RoundedLinear()


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "qwen2-tied-sharded"])
def test_a_quantizer_sees_every_linear_of_the_blocks_in_paddles_layout(paddle: Any, models: Path, case: str) -> None:
    quantizer = Rounding()
    load(models / case, quantizer)
    stored: dict[str, np.ndarray] = {}
    for path in (models / case).glob("model*.safetensors"):
        stored.update(load_file(path))
    prefix = config_of(models / case)["model_type"]
    linears = {name for name in stored if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    assert len(linears) == 14
    assert set(quantizer.given) == {name.replace("model.", f"{prefix}.", 1)[: -len(".weight")] for name in linears}
    for name, (weight, bias) in quantizer.given.items():
        original = name.replace(f"{prefix}.", "model.", 1)
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, stored[f"{original}.weight"].astype(np.float32).T)
        if f"{original}.bias" in stored:
            assert bias is not None
            assert bias.dtype == np.float32
            np.testing.assert_array_equal(bias, stored[f"{original}.bias"].astype(np.float32))
        else:
            assert bias is None


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
def test_a_quantized_model_computes_with_the_rounded_weights(
    paddle: Any, variant: Callable[..., Path], case: str
) -> None:
    """Against a plain model of the same weights, rounded in its files."""
    folder = variant(case)
    quantizer = Rounding()
    model = load(folder, quantizer)

    def around(tensors: dict[str, np.ndarray]) -> None:
        for name, weight in tensors.items():
            if name.endswith("_proj.weight") and "o_proj" not in name:
                codes, scale = Rounding.codes(weight)
                tensors[name] = codes.astype(np.float32) * scale

    change_tensors(folder, around)
    input_ids, exact = reference(folder)
    found = own_logits(model, input_ids)
    assert largest_difference(found, own_logits(load(folder), input_ids)) < TOLERANCE
    assert largest_difference(found, exact) > 100 * TOLERANCE  # it was really rounded


def test_no_float_parameter_of_a_quantized_layer_remains(paddle: Any, models: Path) -> None:
    quantizer = Rounding()
    model = load(models / "qwen2-untied", quantizer)
    left = dict(model.named_parameters())
    quantized = [name for name in quantizer.given if not name.endswith("o_proj")]
    assert len(quantized) == 12
    assert not [name for name in left if name.rpartition(".")[0] in quantized]
    assert len([name for name in left if name.endswith("o_proj.weight")]) == 2
    assert sum(int(parameter.size) for parameter in left.values()) == sum(
        tensor.size
        for name, tensor in load_file(models / "qwen2-untied" / "model.safetensors").items()
        if not any(f".{kind}_proj." in name for kind in ("q", "k", "v", "gate", "up", "down"))
    )


def test_a_quantized_layer_is_still_a_target(paddle: Any, models: Path) -> None:
    plain, quantized = load(models / "llama-tied-gqa"), load(models / "llama-tied-gqa", Rounding())
    described = [
        [(target.name, target.in_features, target.out_features) for target in sft.target_layers(model)]
        for model in (plain, quantized)
    ]
    assert len(described[0]) == 14
    assert described[0] == described[1]


def test_a_missing_weight_is_named_with_a_quantizer_too(paddle: Any, variant: Callable[..., Path]) -> None:
    folder = variant("llama-untied")
    change_tensors(folder, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(sft.UsageError, match=rf"lacks tensors {DOWN}"):
        load(folder, Rounding())


# --- finding a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(sft.UsageError, match="does not exist"):
        sources.find_model(name)


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(sft.UsageError, match="is not a directory"):
        sources.find_model(str(tmp_path / "model"))


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert sources.find_model("some-owner/some-model") == tmp_path
    assert "*.safetensors" in asked["some-owner/some-model"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in asked["some-owner/some-model"])


def test_a_failed_download_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(sft.UsageError, match=r"could not be downloaded from the hub \(no route to host\)"):
        sources.find_model("some-owner/some-model")
