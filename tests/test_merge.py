"""`sft merge` for each technique and format: what is merged computes what base and adapter compute together."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sft
from sft.commands.merge import command
from sft.inference.open import load_for_inference
from sft.testing import write_data

MODEL = Path(__file__).parent.parent / "core" / "tests" / "fixtures" / "models" / "llama-tied-gqa"
TECHNIQUES = {
    "lora": "lora",
    "rslora": "lora rslora",
    "pissa": "lora pissa",
    "vera": "vera",
    "lora-nf4": "lora nf4",
    "pissa-int8": "lora pissa int8",
    "vera-nf4": "vera nf4",
}
FORMATS = {
    "hf": ["--max_shard_size", "20KB"],
    "paddle": ["--format", "paddle", "--device", "cpu"],
    "pdparams": ["--format", "paddle", "--safe_serialization", "false", "--max_shard_size", "20KB"],
}

# Logits of many models in one new process: lines of "MODEL ADAPTER", by sft; or by PaddleNLP alone.
FRESH = """
import json, sys
from pathlib import Path
import numpy as np
from sft.testing import forward, load
asked, logits, ids = json.loads(sys.argv[1]), {}, np.arange(5, 39).reshape(2, 17)
for key, (model, adapter, reader) in asked.items():
    if reader == "sft":
        logits[key] = forward(load(model, Path(adapter) if adapter else None), ids)
    else:
        import paddle
        from paddlenlp.transformers import AutoModelForCausalLM
        theirs = AutoModelForCausalLM.from_pretrained(model)
        theirs.eval()
        with paddle.no_grad():
            logits[key] = theirs(paddle.to_tensor(ids))[0].numpy()
np.savez(sys.argv[2], **logits)
"""


def merge(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each technique, trained for some steps."""
    folder = tmp_path_factory.mktemp("adapters")
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 4) + "."} for n in range(12)]
    write_data(folder, records)
    for name, plugins in TECHNIQUES.items():
        settings = {
            "plugin": plugins.split(),
            "model_name_or_path": str(MODEL),
            "dataset_name_or_path": str(folder),
            "output_dir": str(folder / name),
            "learning_rate": 1e-1 if "vera" in plugins else 1e-2,
            "max_steps": 3,
            "disable_tqdm": True,
        }
        sft.run(settings, say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def logits(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """By "technique reader format", with "adapter" for the base with the adapter over it, and "base" alone."""
    folder = tmp_path_factory.mktemp("merged")
    asked = {"base": (str(MODEL), "", "sft")}
    for technique in TECHNIQUES:
        asked[f"{technique} adapter"] = (str(MODEL), str(adapters / technique), "sft")
        for name, words in FORMATS.items():
            output = folder / f"{technique}-{name}"
            base = ("--model_name_or_path", MODEL, "--lora_path", adapters / technique)
            done = merge(*base, "--merge_model_path", output, *words)
            assert done.exit_code == 0, done.output
            assert "note:" not in done.output
            named = output / "model_state.pdparams.index.json" if name == "pdparams" else output
            asked[f"{technique} sft {name}"] = (str(named), "", "sft")
            if name == "paddle":
                asked[f"{technique} paddlenlp {name}"] = (str(output), "", "paddlenlp")
    line = [sys.executable, "-c", FRESH, json.dumps(asked), str(folder / "logits.npz")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "logits.npz"))


@pytest.mark.parametrize("written", ["sft hf", "sft paddle", "sft pdparams", "paddlenlp paddle"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_merged_is_base_and_adapter(logits: dict[str, np.ndarray], technique: str, written: str) -> None:
    expected = logits[f"{technique} adapter"]
    assert np.abs(expected - logits["base"]).max() > 1e-2 * np.abs(expected).max()
    found = logits[f"{technique} {written}"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- which base ---------------------------------------------------------------------------------------------


def test_over_a_16_bit_base_float32_is_exact_and_the_bases_dtype_is_rounded(adapters: Path, tmp_path: Path) -> None:
    """Tensors against float64: W + s·(A·B)ᵀ of each Linear, from the files."""
    import ml_dtypes

    half = tmp_path / "half"
    shutil.copytree(MODEL, half)
    stored = {name: t.astype(ml_dtypes.bfloat16) for name, t in load_file(MODEL / "model.safetensors").items()}
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    factors = load_file(adapters / "lora" / "adapter_model.safetensors")
    config = json.loads((adapters / "lora" / "adapter_config.json").read_text())
    found = {}
    for dtype in ("base", "float32"):
        out = tmp_path / dtype
        done = merge(
            "--model_name_or_path", half, "--lora_path", adapters / "lora", "--output_path", out, "--dtype", dtype
        )
        assert done.exit_code == 0, done.output
        found[dtype] = load_file(out / "model.safetensors")
        wanted = "bfloat16" if dtype == "base" else "float32"
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == wanted
    for name, base in stored.items():
        key = "base_model.model." + name.removesuffix(".weight")
        exact = base.astype(np.float64)
        if f"{key}.lora_A.weight" in factors:
            a, b = (factors[f"{key}.lora_{half}.weight"].astype(np.float64) for half in "AB")
            exact = exact + config["lora_alpha"] / config["r"] * (b @ a)
        np.testing.assert_allclose(found["float32"][name], exact, rtol=1e-5, atol=1e-6)
        assert str(found["base"][name].dtype) == "bfloat16"
        np.testing.assert_array_equal(found["base"][name], found["float32"][name].astype(ml_dtypes.bfloat16))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A base of the same shapes, in one tensor of which another training has left its mark."""
    folder = tmp_path / "other"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * np.float32(1.01)}, folder / "model.safetensors")
    return folder


def test_merging_into_another_base_says_so(adapters: Path, other: Path, tmp_path: Path) -> None:
    done = merge("--model_name_or_path", other, "--lora_path", adapters / "vera", "--output_path", tmp_path / "merged")
    assert done.exit_code == 0
    (note,) = (line for line in done.output.splitlines() if line.startswith("note:"))
    assert note.startswith(
        f"note: the adapter was trained over other weights than those of {other} (its base was {MODEL})"
    )


def test_answering_with_another_base_says_so(adapters: Path, other: Path) -> None:
    said: dict[Path, list[str]] = {MODEL: [], other: []}
    for base, lines in said.items():
        load_for_inference(str(base), adapters / "lora", lines.append)
    notes = {base: sum(line.startswith("note:") for line in lines) for base, lines in said.items()}
    assert notes == {MODEL: 0, other: 1}


def test_an_adapter_that_does_not_tell_its_base_is_merged_without_a_word(adapters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / "lora", folder)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})  # as PEFT writes it
    done = merge("--model_name_or_path", MODEL, "--lora_path", folder, "--output_path", tmp_path / "merged")
    assert done.exit_code == 0
    assert "note:" not in done.output


def test_the_metadata_of_an_adapter_stand_in_one_order(adapters: Path) -> None:
    """safetensors' library alone would write them in an order that varies, and equal runs different files."""
    path = adapters / "lora" / "adapter_model.safetensors"
    with safe_open(path, "np") as opened:
        assert set(opened.metadata()) == {"format", "sft.base"}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert list(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]) == ["format", "sft.base"]


@pytest.mark.parametrize("weight", [1e6, 3e38, math.nan], ids=["too large", "much too large", "damaged"])
def test_what_the_merge_writes_is_finite(adapters: Path, tmp_path: Path, weight: float) -> None:
    """An adapter whose product is larger than float16's 65,504, or one with a value that is none."""
    half = tmp_path / "half"
    shutil.copytree(MODEL, half)
    stored = {name: t.astype(np.float16) for name, t in load_file(MODEL / "model.safetensors").items()}
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    large = tmp_path / "large"
    shutil.copytree(adapters / "lora", large)
    factors = load_file(large / "adapter_model.safetensors")
    name = next(name for name in factors if "layers.1.self_attn.q_proj.lora_B" in name)
    factors[name][0] = weight
    factors[name.replace("lora_B", "lora_A")][:] = 1
    with safe_open(str(large / "adapter_model.safetensors"), framework="numpy") as file:
        save_file(factors, large / "adapter_model.safetensors", metadata=file.metadata())
    words = ("--model_name_or_path", half, "--lora_path", large, "--output_path", tmp_path / "merged")
    done = merge(*words)
    assert isinstance(done.exception, sft.UsageError)
    assert not (tmp_path / "merged").exists()
    wide = merge(*words, "--dtype", "float32")
    if weight != 1e6:
        cause = "lora_B.weight has values that are not finite" if math.isnan(weight) else "would not be finite"
        assert cause in str(wide.exception)
    else:
        assert "With the adapter, model.layers.1.self_attn.q_proj.weight " in str(done.exception)
        assert "has values that do not fit into float16, the base's; add --dtype float32." in str(done.exception)
        assert wide.exit_code == 0, wide.output
        assert all(
            np.isfinite(tensor).all() for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()
        )


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "There is no device 'tpu'; give cpu, gpu or gpu:N"),
        (["--max_shard_size", "2XB"], "'2XB' is no size; give"),
        (["--safe_serialization", "false"], "the hf format would need torch"),
        (["--plugin", "neftune"], "Plugin neftune has no part in sft merge; leave it out."),
    ],
)
def test_refusals(adapters: Path, tmp_path: Path, words: list[str], message: str) -> None:
    base = ("--model_name_or_path", MODEL, "--lora_path", adapters / "lora")
    done = merge(*base, "--output_path", tmp_path / "merged", *words)
    assert isinstance(done.exception, sft.UsageError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(adapters: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        base = ("--model_name_or_path", MODEL, "--lora_path", adapters / "lora")
        done = merge(*base, "--output_path", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(done.exception, OSError)
    assert not list(tmp_path.iterdir())


def test_paddlenlps_format_is_refused_for_a_family_that_it_does_not_have(adapters: Path, tmp_path: Path) -> None:
    base = MODEL.parent.parent / "families" / "qwen3"
    words = ("--model_name_or_path", base, "--lora_path", adapters / "lora", "--format", "paddle")
    done = merge(*words, "--merge_model_path", tmp_path / "out")
    assert isinstance(done.exception, sft.UsageError)
    assert "PaddleNLP's format is not known here of model_type 'qwen3'" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_export_writes_what_a_merge_writes(adapters: Path, tmp_path: Path) -> None:
    """Bit by bit, adapter and quantizer included: the same files."""
    from sft.commands.export import command as export

    for technique in ("lora", "lora-nf4"):
        given = ("--model_name_or_path", MODEL, "--lora_path", adapters / technique)
        merged, exported = tmp_path / f"{technique}-merged", tmp_path / f"{technique}-exported"
        assert merge(*given, "--output_path", merged).exit_code == 0
        line = [*map(str, given), "--to", "huggingface", "--output_path", str(exported)]
        done = CliRunner().invoke(export, line)
        assert done.exit_code == 0, done.output
        assert {path.name for path in exported.iterdir()} == {path.name for path in merged.iterdir()}
        for path in merged.iterdir():
            assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
        base, whole = load_file(MODEL / "model.safetensors"), load_file(exported / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not np.array_equal(base[name], whole[name])


def test_a_gguf_file_has_the_adapter_folded_in(adapters: Path, tmp_path: Path) -> None:
    """The matrices that llama.cpp has as Hugging Face has them are those of the merged model, bit by bit."""
    import gguf

    from sft.commands.export import command as export

    given = ("--model_name_or_path", str(MODEL), "--lora_path", str(adapters / "lora"))
    merged, exported = tmp_path / "merged", tmp_path / "exported"
    assert merge(*given, "--output_path", merged).exit_code == 0
    done = CliRunner().invoke(export, [*given, "--to", "gguf", "--output_path", str(exported)])
    assert done.exit_code == 0, done.output
    whole, base = load_file(merged / "model.safetensors"), load_file(MODEL / "model.safetensors")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(exported / "model.gguf").tensors}
    for block in range(2):
        for theirs, ours in {
            "attn_v": "self_attn.v_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            name = f"model.layers.{block}.{ours}.weight"
            assert not np.array_equal(whole[name], base[name])
            np.testing.assert_array_equal(found[f"blk.{block}.{theirs}.weight"], whole[name])
