"""What a step asks of a device may not grow: kernels a layer, and waits a step. A GPU would be waited for at each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_calls import NO_NATIVE_CODE, Calls, CountStep, counted
from no_onednn import itself

import sft
from sft.models import onednn
from sft.testing import make_model, needs

Train = Callable[..., sft.Summary]

WAITS = 1
"""For the loss and the gradient norm together: they decide whether the step is taken, and how long it is."""
COPIES = 5
"""Arrays of a micro-batch that go to the device: tokens, cosines, sines, and of positions with a target where they are
and what. (On a GPU also where documents end; NEFTune has the size of its noise.)"""
ON_A_CPU = re.compile(r"(document_attention|blockwise)\.py:|.* _looked_up$")
"""Attention and codes of 4 bits have tables of their own there, where a copy waits for nothing."""


def test_what_counts_as_a_wait(paddle: Any) -> None:
    x, weight = paddle.to_tensor([1.0, 0.0, 2.0]), paddle.create_parameter([3], "float32")
    with counted(paddle) as calls:
        weight.grad_ = x * 2
        weight.grad.scale_(2.0)
        weight.grad = None
        weight.grad = x
        float(x[0]), x.numpy(), x.tolist(), np.asarray(x), bool(x[0] > 0), x[0].item()
        paddle.nonzero(x)
        (x * 2).sum()
    assert [wait.rpartition(" ")[2] for wait in calls.waits] == ["test_what_counts_as_a_wait"] * 7 + ["nonzero"]
    assert calls.kernels["sum"] == calls.kernels["nonzero"] == 1


def test_tests_hide_gpus() -> None:
    """But those of make test-gpu."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.fixture
def of_a_step(train: Train) -> Callable[..., Calls]:
    """What the third of five steps calls. Of these only the first and the last are logged."""

    def measure(name: str = "out", plugin: list[str] = [], native: bool = False, **settings: Any) -> Calls:  # noqa: B006
        common = {"max_steps": 5, "logging_steps": 100, "per_device_train_batch_size": 2, "do_eval": False}
        plugin = plugin if native else [*plugin, *NO_NATIVE_CODE]
        train(name, plugins=(CountStep,), plugin=plugin, **{**common, **settings})
        return CountStep.calls

    return measure


@pytest.mark.parametrize(
    "plugins",
    [
        [],
        pytest.param(["lora", "zero-padding"], marks=[needs("lora", "zero-padding"), pytest.mark.slow]),
        pytest.param(
            ["lora", "zero-padding", "flashmask"],
            marks=[needs("lora", "zero-padding", "flashmask"), pytest.mark.slow],
        ),
        pytest.param(["lora", "nf4"], marks=[needs("lora", "nf4"), pytest.mark.slow]),
        pytest.param(["vera", "neftune"], marks=[needs("vera", "neftune"), pytest.mark.slow]),
    ],
    ids=lambda plugins: "+".join(plugins) or "full",
)
def test_a_step_waits_once_whatever_its_micro_batches(of_a_step: Callable[..., Calls], plugins: list[str]) -> None:
    """Packed, two records share a row."""
    calls = of_a_step(gradient_accumulation_steps=3, plugin=plugins, max_length=40)
    assert calls.micro_batches == 3
    assert len(calls.waits) <= WAITS, calls.waits
    copies = [copy for copy in calls.copies if not ON_A_CPU.match(copy)]
    assert len(copies) <= 3 * (COPIES + ("neftune" in plugins)), copies


@pytest.mark.slow
def test_a_logged_step_waits_no_longer(of_a_step: Callable[..., Calls]) -> None:
    assert len(of_a_step(logging_steps=1).waits) <= WAITS


def test_sums_of_16_bit_gradients_wait_for_nothing(paddle: Any) -> None:
    from sft.training.wide_sums import WideSums

    weight = paddle.base.framework.EagerParamBase.from_tensor(paddle.ones([4]).astype("bfloat16"))
    weight.stop_gradient = False
    sums = WideSums([weight])
    with counted(paddle) as calls:
        for _ in range(3):
            with sums.backward():
                (weight * 2).sum().backward()
    assert calls.waits == []
    assert weight.grad.tolist() == [6.0] * 4


def test_a_mixture_of_experts_waits_once_a_layer(paddle: Any) -> None:
    """For how many tokens each expert has; backward knows."""
    experts = [paddle.nn.Linear(8, 8) for _ in range(5)]
    tokens = paddle.randn([12, 8])
    tokens.stop_gradient = False
    weights, chosen = paddle.topk(paddle.rand([12, 5]), 2, axis=-1)
    with counted(paddle) as calls:
        sft.through_experts(tokens, weights, chosen, experts).sum().backward()
    assert len(calls.waits) == 1, calls.waits


LAYER = {"full": 190, "lora": 228}
"""Kernels of a layer of Llama on a CPU, forward, backward and optimizer's step, without recompute."""
ON_A_GPU = {"full": 127, "lora": 189}
"""Likewise with the kernels of a GPU, but attention."""
TECHNIQUES = [pytest.param("full", marks=pytest.mark.slow), pytest.param("lora", marks=needs("lora"))]


@pytest.fixture
def of_a_layer(of_a_step: Callable[..., Calls], tmp_path: Path) -> Callable[[str], Counter[str]]:
    """The kernels of a layer, twice: of two models the one has two layers more."""

    def measure(technique: str) -> Counter[str]:
        plugins = ["lora"] if technique == "lora" else []
        each: list[Counter[str]] = []
        for layers in (2, 4):
            model = make_model(tmp_path / f"model-{layers}", num_hidden_layers=layers)
            each.append(of_a_step(f"out-{layers}", model_name_or_path=str(model), plugin=plugins).kernels)
        return each[1] - each[0]

    return measure


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_kernels_of_a_layer(of_a_layer: Callable[[str], Counter[str]], technique: str) -> None:
    kernels = of_a_layer(technique)
    assert kernels.total() <= 2 * LAYER[technique], kernels.most_common()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_kernels_of_a_layer_on_a_gpu(
    of_a_layer: Callable[[str], Counter[str]], paddle: Any, monkeypatch: pytest.MonkeyPatch, technique: str
) -> None:
    """Fused operations have none on a CPU. A product of two tensors stands for each, one kernel forward and one
    backward as they are: what is counted is what stands around them, casts and shapes."""
    from sft.models.gpu_kernels import GpuKernels

    functional, fused = paddle.nn.functional, paddle.incubate.nn.functional
    monkeypatch.setattr(functional, "rms_norm", lambda x, shape, weight, epsilon: (x * weight, None))
    monkeypatch.setattr(fused, "fused_rotary_position_embedding", lambda q, sin, cos, **_: (q * cos, None, None))
    monkeypatch.setattr("sft.models.setup.own_kernels", lambda precision: GpuKernels())
    kernels = of_a_layer(technique)
    assert kernels.total() <= 2 * ON_A_GPU[technique], kernels.most_common()


IN_16_BITS = {"plain": 1160, "native": 700}
"""Kernels of a step of two micro-batches through two layers with LoRA in bfloat16, without and with fast-cpu, whose
code is not counted; nor are oneDNN's products."""


@needs("lora")
@pytest.mark.parametrize(
    "how", [pytest.param("plain", marks=pytest.mark.slow), pytest.param("native", marks=needs("fast-cpu"))]
)
def test_the_kernels_and_waits_of_16_bits(
    of_a_step: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """By paddle's oneDNN, whether or not this processor multiplies bfloat16 fast."""
    itself()  # or a skip
    monkeypatch.setattr(onednn, "why_not", lambda: None)
    said: list[str] = []
    calls = of_a_step(
        native=how == "native", plugin=["lora"], bf16=True, gradient_accumulation_steps=2, say=said.append
    )
    assert calls.micro_batches == 2
    assert "precision: bfloat16 products" in "\n".join(said)
    assert len(calls.waits) <= WAITS, calls.waits
    assert calls.kernels.total() <= IN_16_BITS[how], calls.kernels.most_common()
