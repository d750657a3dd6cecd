"""Through models and runs: losses, gradients and text are those of the default attention, padded and packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sft
from sft import hookspecs
from sft.data.batches import assemble
from sft.data.tokenizer import Tokenizer
from sft.plugins.registry import Plugins
from sft.plugins.requests import choose_plugins
from sft.seams import Batch, Example
from sft.settings.arguments import GenerationArguments
from sft.settings.reading import build
from sft.testing import forward, needs, read_metrics

CASES = ["llama-tied-gqa", "llama3-scaled", "qwen2-untied", "mistral-gqa", "gemma-tied"]


def backend_of(name: str) -> Any:
    if name == "default":
        from sft.models.attention import DefaultAttention

        return DefaultAttention()
    active = Plugins.load([name], hookspecs)
    active.start(build({}, active).options)
    return active.hook.sft_attention_backend(run=None, config=None)


def load(folder: Path, backend: Any = None) -> Any:
    from sft.models.loading import load_model, open_model

    model = load_model(open_model(folder))
    if backend is not None:
        model.attention = backend
    return model


def batch_of(rows: list[tuple[int, ...]]) -> Batch:
    """Random documents of these lengths; the first third of each is a prompt."""
    generator = np.random.default_rng(7)
    made: dict[int, Example] = {}
    for size in [size for row in rows for size in row]:
        ids = generator.integers(3, 300, size)
        labels = np.append(ids[1:], -100)
        labels[: size // 3] = -100
        made.setdefault(size, Example(ids, labels))
    return assemble([[made[size] for size in row] for row in rows], pad_id=0)


def loss_and_gradients(folder: Path, backend: str, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    from sft.training.loss import batch_loss

    model = load(folder, backend_of(backend))
    loss = batch_loss(model, batch)
    loss.backward()
    return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def compare(found: tuple[float, dict[str, np.ndarray]], expected: tuple[float, dict[str, np.ndarray]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.abs(found[1][name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


PACKED = [(5, 9, 12), (20, 3), (17,)]
PADDED = [(size,) for row in PACKED for size in row]


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["flashmask", "flash-attention"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_default(
    paddle: Any, models: Path, case: str, backend: str, rows: list[tuple[int, ...]]
) -> None:
    batch = batch_of(rows)
    compare(loss_and_gradients(models / case, backend, batch), loss_and_gradients(models / case, "default", batch))


@pytest.mark.parametrize("backend", ["flashmask", "flash-attention"])
@pytest.mark.parametrize("case", CASES)
def test_packed_is_unpacked(paddle: Any, models: Path, case: str, backend: str) -> None:
    found, expected = (loss_and_gradients(models / case, backend, batch_of(rows)) for rows in (PACKED, PADDED))
    compare(found, expected)


@pytest.mark.parametrize(
    ("backend", "rows", "kernel"),
    [
        ("flash-attention", PADDED, "flash"),
        ("flash-attention", PACKED, "mask"),
        ("flashmask", PADDED, "mask"),
        ("flashmask", PACKED, "mask"),
    ],
    ids=["flash-attention-padded", "flash-attention-packed", "flashmask-padded", "flashmask-packed"],
)
def test_16_bit_tensors_on_a_gpu_go_to_paddles_kernels(
    paddle: Any, models: Path, monkeypatch: pytest.MonkeyPatch, backend: str, rows: Any, kernel: str
) -> None:
    """What a model hands to its backend for a batch, with stand-ins for 16-bit tensors and kernels: this says which
    kernel is called, not what it computes."""
    from paddle.nn.functional import flash_attention as module

    from sft.models.forward import hidden_states
    from sft_attn_flashmask import gpu

    monkeypatch.setattr(gpu, "capability", lambda: 80)
    found, batch, asked = backend_of(backend), batch_of(rows), []
    own = found.attend

    def attend(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return own(*arguments)

    monkeypatch.setattr(found, "attend", attend)
    if rows is PADDED and kernel == "flash":  # on a CPU it would skip the padding
        monkeypatch.setattr(type(found), "describes_padding", False)
    with paddle.no_grad():
        hidden_states(load(models / "llama-tied-gqa", found), batch)
    assert len(asked) == 2

    def fused(*tensors: Any, causal: bool) -> tuple[Any, None]:
        return ("flash", tensors, causal, None), None

    def masked(*tensors: Any, startend_row_indices: Any, causal: bool) -> Any:
        return "mask", tensors, causal, startend_row_indices.numpy().tolist()

    monkeypatch.setattr(module, "flash_attention", fused)
    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", masked)
    expected = None if kernel == "flash" else batch.startend_row_indices.tolist()
    for dtype in ("paddle.bfloat16", "paddle.float16"):
        tensor = SimpleNamespace(place=SimpleNamespace(is_gpu_place=lambda: True), dtype=dtype)
        tensors = (tensor, tensor, tensor)
        for mask in asked:
            assert own(*tensors, mask) == (kernel, tensors, True, expected)


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_answers_are_the_same_with_a_backend(paddle: Any, models: Path, case: str) -> None:
    """Of a prompt of the model's own, for which the likeliest next token is asked again and again through the backend:
    what answers are computed with, a cache, agrees with it."""
    from sft.models.generation import answers

    tokenizer = Tokenizer(models / case)
    prompt = tokenizer.encode("Hello there, how are you?")
    tokenizer.stop_ids = []
    model, grown = load(models / case, backend_of("flashmask")), list(prompt)
    for _ in range(8):
        grown.append(int(forward(model, np.asarray([grown]))[0, -1].argmax()))
    found = answers(model, tokenizer, [prompt], GenerationArguments(max_new_tokens=8), 0)
    assert found == [tokenizer.decode(grown[len(prompt) :])]


# --- runs ---------------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [value for line in read_metrics(folder) for key, value in line.items() if key in ("loss", "eval_loss")]


@needs("lora")
@pytest.mark.parametrize("backend", ["flashmask", "flash-attention"])
@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
def test_a_lora_run_has_the_losses_of_the_default(
    train: Callable[..., Any], models: Path, tmp_path: Path, case: str, backend: str
) -> None:
    model = str(models / case)
    train("default", plugin=["lora"], model_name_or_path=model)
    train("blockwise", plugin=["lora", backend], model_name_or_path=model)
    found, expected = losses(tmp_path / "blockwise"), losses(tmp_path / "default")
    assert len(found) >= 5
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_flashmask_takes_the_place_of_flash_attention(paddle: Any) -> None:
    active = Plugins.load(["flash-attention", "flashmask"], hookspecs)
    active.start(build({}, active).options)
    assert active.provider("sft_attention_backend") == "flashmask"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_flash_attention": True}, ["flash-attention"]),
        ({"flash_mask": True}, ["flashmask"]),
        ({"use_flash_attention": "true", "flash_mask": "true"}, ["flash-attention", "flashmask"]),
        ({"use_flash_attention": False, "flash_mask": False}, []),
        ({"flashmask": True}, ["flashmask"]),
    ],
    ids=str,
)
def test_paddlenlps_settings_activate(settings: dict[str, Any], expected: list[str]) -> None:
    names, left = choose_plugins(settings, ())
    assert sorted(names) == expected
    assert not left


@pytest.mark.parametrize("backend", ["flashmask", "flash-attention"])
def test_kernels_that_skip_what_is_masked_compute_it(paddle: Any, models: Path, backend: str) -> None:
    """Theirs is asked with the mask that they made; that of kernels which do not skip never is."""
    from sft.models.forward import hidden_states
    from sft.models.kernels import use_kernels

    class Kernels(sft.Kernels):
        skips_masked = False

        def __init__(self) -> None:
            self.masks: list[Any] = []
            self.asked: list[Any] = []

        def mask(self, ends: Any) -> Any:
            self.masks.append((ends, super().mask(ends)))
            return self.masks[-1]

        def attention(self, query: Any, key: Any, value: Any, mask: Any, cap: float | None) -> Any:
            self.asked.append(mask)
            return super().attention(query, key, value, mask[1], cap)

    model, batch = load(models / "llama-tied-gqa", backend_of(backend)), batch_of(PACKED)
    with paddle.no_grad():
        expected = hidden_states(model, batch).numpy()
        for skips in (False, True):
            Kernels.skips_masked, kernels = skips, Kernels()
            use_kernels(model, kernels)
            np.testing.assert_allclose(hidden_states(model, batch).numpy(), expected, atol=1e-5, rtol=0)
            assert len(kernels.masks) == skips
            assert len(kernels.asked) == 2 * skips
            assert all(asked is kernels.masks[0] for asked in kernels.asked)
