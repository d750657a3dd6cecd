"""Through models and runs: with native code they learn what they learn without it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft
from sft.testing import load, needs, read_metrics

FIXTURES = Path(__file__).parents[3] / "core" / "tests" / "fixtures"
# Scaled, partial and neighbouring rotation; norms of heads and around blocks, 1 + w; windows, caps, biases, experts.
FAMILIES = [
    *("models/llama-tied-gqa", "families/qwen3"),
    *(
        pytest.param(f"families/{name}", marks=pytest.mark.slow)
        for name in ("gemma2", "gemma3", "glm4", "granite", "llama-biased", "olmo2", "phi3-longrope", "qwen2-window")
    ),
    *(pytest.param(f"families/{name}", marks=pytest.mark.slow) for name in ("qwen3-moe", "smollm3")),
]


@pytest.fixture
def model(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> Path:
    """A tiny model of the family that the test names, with a tokenizer, and with as many tokens as that has."""
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / request.getfixturevalue("family"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models / "llama-tied-gqa" / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size, tensors = config["vocab_size"], load_file(folder / "model.safetensors")
    wanted = json.loads((models / "llama-tied-gqa" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    for name, tensor in tensors.items():
        if tensor.shape[0] == size < wanted:
            tensors[name] = np.resize(tensor, (wanted, *tensor.shape[1:]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config["vocab_size"] = max(size, wanted)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@needs("lora")
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_the_same(train: Callable[..., Any], tmp_path: Path, model: Path, family: str) -> None:
    """Four steps: losses, and the adapter in the end."""
    found = []
    for out, plugins in (("native", ["lora"]), ("plain", ["lora", "no:fast-cpu"])):
        settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "plugin": plugins}
        train(out, model_name_or_path=str(model), **settings)
        adapter = load(model, tmp_path / out, plugins=["no:fast-cpu"]).state_dict()
        found.append(([line["loss"] for line in read_metrics(tmp_path / out) if "loss" in line], adapter))
    (losses, adapter), (expected, other) = found
    assert len(losses) == 4
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    learned = [name for name in adapter if "lora_B" in name]
    assert learned
    for name in learned:  # Adam's first steps have the size of the learning rate, whatever the gradient
        np.testing.assert_allclose(adapter[name].numpy(), other[name].numpy(), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_weights_are_the_same(library: Any, input_ids: np.ndarray, model: Path, family: str) -> None:
    from sft.data.batches import assemble
    from sft.models.kernels import use_kernels
    from sft.training.loss import batch_loss
    from sft_kernels_cpu.kernels import NativeKernels

    weights = np.linspace(0.1, 4, input_ids.shape[1], dtype=np.float32)
    documents = [sft.Example(row, np.append(row[1:], -100), weights * n) for n, row in enumerate(input_ids, start=1)]
    batch, found = assemble([documents, documents[::-1]], pad_id=0), []
    for kernels in (sft.PLAIN, NativeKernels(library)):
        computed = load(model, plugins=["no:fast-cpu"])
        use_kernels(computed, kernels)
        for parameter in computed.parameters():
            parameter.stop_gradient = False
        loss = batch_loss(computed, batch)
        loss.backward()
        found.append((float(loss), {name: one.grad.numpy() for name, one in computed.named_parameters()}))
    (expected, others), (loss, gradients) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        assert np.abs(gradient - others[name]).max() <= 1e-5 * np.abs(others[name]).max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same(library: Any, input_ids: np.ndarray, model: Path, family: str) -> None:
    """Two prompts, one padded on the left: the logits of six tokens, each the likeliest after those before."""
    import paddle

    from sft.models.cache import CachedReading
    from sft.models.kernels import use_kernels
    from sft_kernels_cpu.kernels import NativeKernels

    found: list[list[np.ndarray]] = []
    for kernels in (sft.PLAIN, NativeKernels(library)):
        computed, padding = load(model, plugins=["no:fast-cpu"]), np.asarray([0, 3])
        computed.eval()
        use_kernels(computed, kernels)
        reading, ids, logits = CachedReading(computed.architecture, padding, kernels), input_ids[:2, :9].copy(), []
        with paddle.no_grad():
            for _ in range(6):
                reading.expect(ids.shape[1])
                hidden = computed.hidden_states(computed.embed(paddle.to_tensor(ids)), reading)
                logits.append(computed.lm_head(hidden[:, -1:])[:, 0].numpy())
                ids = logits[-1].argmax(-1)[:, None]
        found.append(logits)
    for plain, native in zip(*found, strict=True):
        assert (plain.argmax(-1) == native.argmax(-1)).all()
        assert np.abs(plain - native).max() <= 1e-5 * np.abs(plain).max()


def test_a_run_on_a_cpu_has_it_until_it_is_switched_off(adapt: Callable[..., sft.Run]) -> None:
    from sft_kernels_cpu.kernels import NativeKernels

    assert isinstance(adapt(plugin=[]).model.kernels, NativeKernels)
    assert adapt(plugin=["no:fast-cpu"]).model.kernels is sft.PLAIN


def test_a_resumed_run_says_where_other_native_code_computes(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The level is part of a run's arithmetic: vectors of other lengths add up in another order."""
    from sft_kernels_cpu import library

    level = library.native().level
    train("first", max_steps=1, save_strategy="steps", save_steps=1)
    assert json.loads((tmp_path / "first" / "run.json").read_text())["arithmetic"]["native_code"] == level

    def notes(**settings: Any) -> list[str]:
        said: list[str] = []
        checkpoint = str(tmp_path / "first" / "checkpoint-1")
        fixed = {"max_steps": 2, "resume_from_checkpoint": checkpoint, "overwrite_output_dir": True}
        train("next", say=said.append, **fixed, **settings)
        return [line for line in said if "another arithmetic" in line]

    def note(now: str, kernels: str = "") -> str:
        return (
            f"note: checkpoint-1 was computed with another arithmetic, {kernels}native_code {level} (now {now}); what "
            "follows may differ in its last digits from what that run would have computed"
        )

    assert notes() == []
    version = importlib.metadata.version("sft-kernels-cpu")
    assert notes(plugin=["no:fast-cpu"]) == [note("unset", f"kernels fast-cpu (sft-kernels-cpu {version}) (now own), ")]
    with pytest.raises(
        sft.UsageError, match=rf"another arithmetic, .* native_code {level} \(now unset\); compute with"
    ):
        notes(plugin=["no:fast-cpu"], deterministic="strict")
    other = next(name for name in reversed(library.LEVELS) if name != level)
    found = library.native(other)
    if not isinstance(found, str):
        monkeypatch.setattr(library, "native", lambda: found)
        assert notes() == [note(other)]


def test_without_native_code_a_run_says_so_and_goes_on(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_kernels_cpu import library

    monkeypatch.setattr(library, "native", lambda: "it was not built, for want of a C++ compiler that can")
    said: list[str] = []
    train(say=said.append, max_steps=1)
    assert [line for line in said if line.startswith("fast-cpu: ")] == [
        "fast-cpu: paddle's own operations compute, as the native code is not usable: it was not built, for want of a "
        "C++ compiler that can"
    ]


def test_without_native_code_answers_say_so_once(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft_kernels_cpu import library, plugin

    monkeypatch.setattr(library, "native", lambda: "of a reason")
    plugin._to_standard_error.cache_clear()
    for _ in range(2):
        assert type(load(base_model).kernels) is sft.Kernels
    said = capsys.readouterr()
    assert (
        said.err.count("fast-cpu: paddle's own operations compute, as the native code is not usable: of a reason\n")
        == 1
    )
    assert said.out == ""


def test_its_threads_are_those_of_paddles_openmp(tmp_path: Path) -> None:
    """Two pools of threads would wait for each other. What the loader says it bound, function by function."""
    script = """
from sft import runtime
runtime.prepare()
import paddle
from sft_kernels_cpu.library import native
from sft_kernels_cpu.kernels import NativeKernels
NativeKernels(native()).rms_norm(paddle.ones([64, 512]), paddle.ones([512]), 1e-5, 0.0)
"""
    environment = {**os.environ, "LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "log")}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=100, env=environment)
    bound = [line for log in tmp_path.glob("log.*") for line in log.read_text(errors="replace").splitlines()]
    ours = [line for line in bound if "binding file" in line and "sft_kernels_cpu" in line.partition(" to ")[0]]
    openmp = [line.partition(" to ")[2] for line in ours if "GOMP_" in line or "kmpc_" in line or "omp_" in line]
    assert openmp
    assert [line for line in openmp if "libiomp5.so" not in line] == []
