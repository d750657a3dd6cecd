"""Each family beside PaddleNLP's own model of the same checkpoint, and the protocol that every class keeps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_configs import CONFIGS

import sft
from sft.files import read_report, write_json
from sft.testing import check_family, emulated_autocast, forward, load, needs

CASES = ["qwen", "chatglm", "chatglm-plain", "deepseek-v2-lite", "deepseek-v2"]
PLUGIN = "paddlenlp-models"


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_paddlenlp(
    paddle: Any, checkpoints: Callable[[str], Path], theirs: Callable[[str], Any], case: str, monkeypatch: Any
) -> None:
    own = paddle.cumsum  # which PaddleNLP takes to keep its argument's dtype, as it once did
    monkeypatch.setattr(paddle, "cumsum", lambda x, axis=None: own(x, axis).astype(x.dtype))
    ids = np.random.default_rng(1).integers(3, 2048, (2, 19))
    with paddle.no_grad():
        found = theirs(case)(input_ids=paddle.to_tensor(ids), attention_mask=paddle.ones(ids.shape, "int64"))
    expected = np.asarray((found[0] if isinstance(found, tuple) else found).numpy())
    logits = forward(load(checkpoints(case), plugins=[PLUGIN]), ids)
    assert np.abs(logits - expected).max() <= 5e-6 * np.abs(expected).max()
    assert np.ptp(expected, axis=-1).min() > 1


@pytest.mark.parametrize("case", CASES)
def test_the_protocol_is_kept(checkpoints: Callable[[str], Path], case: str) -> None:
    check_family(checkpoints(case), PLUGIN)


@pytest.mark.parametrize("case", ["qwen", "chatglm", "deepseek-v2"])
def test_a_lora_run_packs_learns_answers_and_merges(
    train: Callable[..., sft.Summary], checkpoints: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    """What was packed and recomputed is what rows of one record without recomputation give."""
    pytest.importorskip("sft_peft_lora")
    from safetensors.numpy import load_file

    from sft.inference.merge import merge
    from sft.testing import read_metrics

    base = checkpoints(case)
    settings = {"model_name_or_path": str(base), "plugin": [PLUGIN, "lora"], "per_device_train_batch_size": 12}
    train("plain", **settings, eval_with_do_generation=True, do_eval=True, max_new_tokens=3)
    train("packed", **settings, zero_padding=True, max_length=64, recompute=True)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("plain", "packed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert "eval_bleu4" in read_metrics(tmp_path / "plain")[-1]
    names = set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    stored = set(load_file(base / "model.safetensors"))
    linears = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}
    assert linears < {name.removesuffix(".weight") for name in stored}
    ids = np.arange(3, 23)[None]
    adapted = forward(load(base, tmp_path / "plain"), ids)  # the file names the plugin
    assert np.abs(adapted - forward(load(base, plugins=[PLUGIN]), ids)).max() > 1e-3
    merge(str(base), tmp_path / "plain", tmp_path / "merged", lambda text: None)
    merged = forward(load(tmp_path / "merged", plugins=[PLUGIN]), ids)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen", {"rotary_pct": 0.25}, "rotary_pct as 1.0, all that PaddleNLP's class computes"),
        ("qwen", {"tie_word_embeddings": True}, "tie_word_embeddings as false"),
        ("chatglm", {"rope_ratio": 50.0}, "rope_ratio as 1, all that PaddleNLP's class computes"),
        ("chatglm", {"position_encoding_2d": True}, "is a ChatGLM of the first generation"),
        ("deepseek-v2", {"rope_scaling": None}, "rope_scaling as an object of type yarn"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method as one of greedy, group_limited_greedy"),
    ],
)
def test_what_its_class_would_compute_otherwise_is_refused(
    tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    write_json(tmp_path / "config.json", {**CONFIGS[case], **changes})
    with pytest.raises(sft.UsageError, match=message):
        check_family(tmp_path, PLUGIN)


def test_without_the_plugin_they_are_not_known(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(sft.UsageError, match=r"model_type 'qwen' is not a family that is known here.*--plugin NAME"):
        load(checkpoints("qwen"))


def test_asking_for_the_plugin_imports_no_paddlenlp() -> None:
    line = "import sys, sft_models_paddlenlp.plugin; sys.exit('paddlenlp' in sys.modules or 'paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], timeout=60).returncode == 0


@needs("parallel-4d")
def test_several_processes_are_refused_in_a_sentence(train: Callable[..., sft.Summary]) -> None:
    with pytest.raises(sft.UsageError, match=rf"{PLUGIN} \(.*\) and parallel-4d \(.*\) cannot work together"):
        train(plugin=[PLUGIN, "parallel-4d"], nproc=2)


@needs("nf4", "lora")
def test_a_quantizer_holds_its_linears(train: Callable[..., sft.Summary], checkpoints: Callable[[str], Path]) -> None:
    base = checkpoints("chatglm")
    said: list[str] = []
    summary = train(plugin=[PLUGIN, "nf4", "lora"], model_name_or_path=str(base), say=said.append, max_steps=1)
    assert read_report(summary.output_dir)["packages"]["paddlenlp"] == version("paddlenlp")
    assert any("8 Linears held by nf4" in line for line in said), said


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen", "deepseek-v2"])
def test_an_answer_brings_no_warnings_of_paddlenlps(checkpoints: Callable[[str], Path], case: str) -> None:
    words = ["--model_name_or_path", str(checkpoints(case)), "--plugin", PLUGIN, "--prompt", "hello"]
    line = [sys.executable, "-m", "sft", "generate", *words, "--max_new_tokens", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@needs("lora")
@pytest.mark.parametrize("case", ["qwen", "chatglm", "deepseek-v2"])
def test_16_bits_are_those_of_its_matrices(
    train: Callable[..., sft.Summary], checkpoints: Callable[[str], Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft import dnnl
    from sft.models import onednn

    if dnnl.library() is None:
        pytest.skip("this build of paddle has no oneDNN")
    monkeypatch.setattr(onednn, "why_not", lambda: None)  # whether or not this processor does it fast
    settings = {"model_name_or_path": str(checkpoints(case)), "plugin": [PLUGIN, "lora"], "max_steps": 1}
    exact = train("exact", **settings).train_loss_last
    summary = train("short", plugins=(Look,), bf16=True, **settings)
    matrices = {name for name, dtype in Look.dtypes.items() if dtype == "bfloat16"}
    others = {name for name in Look.dtypes if name not in matrices and "lora_" not in name}
    assert all("norm" in name or "ln_" in name or name.endswith(("bias", "gate.weight")) for name in others), others
    assert {name for name in Look.dtypes if "lora_" in name}.isdisjoint(matrices)
    assert exact != summary.train_loss_last == pytest.approx(exact, rel=1e-2)


class Look(sft.Plugin):
    """Sees in what the tensors of a run's model are held."""

    name, api_version = "look", 1
    dtypes: ClassVar[dict[str, str]] = {}

    @sft.hookimpl
    def sft_run_started(self, run: Any) -> None:
        Look.dtypes = {name: str(one.dtype).rpartition(".")[2] for name, one in run.model.named_parameters()}


@pytest.mark.parametrize("case", ["qwen", "chatglm"])
def test_a_pass_reads_nothing_from_the_device(
    paddle: Any, checkpoints: Callable[[str], Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would wait for it. (Experts, which DeepSeek-V2 has, are asked for once a layer.)"""
    from sft.models.forward import hidden_states

    model = load(checkpoints(case), plugins=[PLUGIN])
    ids = np.arange(3, 20)
    batch = sft.assemble([[sft.Example(ids, ids)]], 0)

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor's value was read")

    for name in ("numpy", "item", "tolist", "__array__", "__int__", "__float__", "__bool__", "__index__"):
        monkeypatch.setattr(paddle.Tensor, name, read)
    hidden = hidden_states(model, batch)
    monkeypatch.undo()
    assert np.isfinite(hidden.numpy()).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_automatic_casts_do_not_round_angles(paddle: Any, checkpoints: Callable[[str], Path], dtype: str) -> None:
    """PaddleNLP makes those of DeepSeek-V2 by einsum, whose result in bfloat16 is off by up to 16 at position 4,095."""
    from paddlenlp.transformers.deepseek_v2.modeling import DeepseekV2RotaryEmbedding

    model = load(checkpoints("deepseek-v2"), plugins=[PLUGIN])
    model.longest, model.tables.own = 4096, DeepseekV2RotaryEmbedding(8, 16)
    frequencies = model.tables.own.inv_freq.numpy().astype(np.float64)
    with emulated_autocast(dtype):
        cosines, sines = model.tables(paddle.ones([1]))
    angles = np.tile(np.arange(4096)[:, None] * frequencies, 2)
    np.testing.assert_allclose(cosines.numpy().reshape(angles.shape), np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(sines.numpy().reshape(angles.shape), np.sin(angles), atol=1e-3)
