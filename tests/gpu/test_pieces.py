"""On a GPU: the pieces of a model, each against float64 or against the plain operations."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_measures import ROUNDING, apart, dtypes, own_kernels, tensor

from sft.testing import needs

pytestmark = pytest.mark.gpu

Row = Callable[..., None]


def test_paddle_finds_its_device(paddle: Any, row: Row) -> None:
    paddle.utils.run_check()
    row("paddle.utils.run_check()", "passes")


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(paddle: Any, on_gpu: bool, row: Row, offset: float) -> None:
    random = np.random.default_rng(0)
    x, weight, slope = (random.standard_normal(shape) for shape in ((2, 300, 1024), (1024,), (2, 300, 1024)))
    for dtype in dtypes(on_gpu):
        given = [tensor(paddle, array, dtype) for array in (x, weight)]
        y = own_kernels().rms_norm(*given, 1e-6, offset)
        (y.astype("float32") * paddle.to_tensor(slope.astype(np.float32))).sum().backward()
        wide, factor = (one.astype("float32").numpy().astype(np.float64) for one in given)
        inverse = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        normal, steep = wide * inverse, slope * (factor + offset)
        grad = (steep - normal * (steep * normal).mean(-1, keepdims=True)) * inverse
        wanted = [normal * (factor + offset), grad, (slope * normal).sum((0, 1))]
        found = max(apart(one, other) for one, other in zip((y, given[0].grad, given[1].grad), wanted, strict=True))
        row(f"RMSNorm, offset {offset:g}, {dtype}", found, 2 * ROUNDING[dtype])


class Losses:
    """Losses of random hidden states [1, positions, hidden], through an lm_head whose logits come in ``chunks``."""

    def __init__(
        self, paddle: Any, monkeypatch: pytest.MonkeyPatch, vocabulary: int, hidden: int, positions: int, chunks: int
    ) -> None:
        from sft.training import loss

        monkeypatch.setattr(loss, "chunk_bytes", lambda memory: 4 * vocabulary * positions // chunks)
        random = np.random.default_rng(5)
        self.paddle, self.target_loss = paddle, loss.target_loss
        self.states = random.standard_normal((1, positions, hidden)) / hidden**0.5
        self.weight = random.standard_normal((hidden, vocabulary))
        self.labels = random.integers(0, vocabulary, (1, positions))

    def compute(self, dtype: str, *more: Any) -> tuple[float, Any, Any]:
        """The loss, and the tensors of states and head, which have their gradients; ``more`` goes to target_loss."""
        given, head = (tensor(self.paddle, array, dtype) for array in (self.states, self.weight))
        value = self.target_loss(given, self.labels, SimpleNamespace(weight=head, kernels=own_kernels()), *more)
        value.backward()
        return float(value), given, head


def compare(row: Row, what: str, dtype: str, found: tuple[float, Any, Any], exact: tuple[float, Any, Any]) -> None:
    """What :meth:`Losses.compute` gives with an exact loss, and the exact gradients of states and head."""
    (value, given, head), (wanted, of_states, of_head) = found, exact
    tolerance = {"float32": 1e-5}.get(dtype)
    row(f"{what}, {dtype}", abs(value / wanted - 1), tolerance or 2e-3)
    row(f"… gradient of hidden states, {dtype}", apart(given.grad[0], of_states), tolerance or 1e-2)
    row(f"… gradient of lm_head, {dtype}", apart(head.grad, of_head), tolerance or 5e-3)


def test_loss(paddle: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """64 chunks of 128,000 logits, against float64."""
    vocabulary, hidden, positions = (128_000, 512, 512) if on_gpu else (4_000, 64, 64)
    losses = Losses(paddle, monkeypatch, vocabulary, hidden, positions, chunks=64)
    chosen = np.arange(positions), losses.labels[0]
    for dtype in dtypes(on_gpu):
        found = losses.compute(dtype)
        wide, matrix = (one.astype("float32").numpy().astype(np.float64) for one in found[1:])
        logits = wide[0] @ matrix
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        exact = -np.log(chances[chosen]).sum()
        chances[chosen] -= 1
        compare(row, f"loss, {vocabulary:,} tokens", dtype, found, (exact, chances @ matrix.T, wide[0].T @ chances))


class Mixed:
    """A loss of a token that is made of all three numbers."""

    def loss(self, targets: Any, before: Any) -> Any:
        every = targets.log_normaliser - targets.mean_logit
        return before * (1.0 - targets.log_probability.exp()) + 0.1 * every + 0.01 * targets.log_normaliser.square()


def test_losses_of_tokens(paddle: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    """16 chunks of 32,000 logits, against autograd over whole logits in float64."""
    from sft.training.token_losses import TokenLosses

    vocabulary, hidden, positions = (32_000, 256, 256) if on_gpu else (4_000, 64, 64)
    losses = Losses(paddle, monkeypatch, vocabulary, hidden, positions, chunks=16)
    for dtype in dtypes(on_gpu):
        found = losses.compute(dtype, 1.0, None, TokenLosses([("mixed", Mixed())]))
        _, given, head = found
        wide, matrix = (paddle.to_tensor(one.astype("float32").numpy().astype(np.float64)) for one in (given[0], head))
        wide.stop_gradient = matrix.stop_gradient = False
        logits = paddle.matmul(wide, matrix)
        chosen = paddle.take_along_axis(logits, paddle.to_tensor(losses.labels[0])[:, None], axis=-1)
        normaliser = paddle.logsumexp(logits, axis=-1, keepdim=True)
        nats = normaliser - chosen
        exact = nats * (1.0 - (-nats).exp()) + 0.1 * (normaliser - logits.mean(axis=-1, keepdim=True))
        exact = (exact + 0.01 * normaliser.square()).sum()
        exact.backward()
        gradients = wide.grad.numpy(), matrix.grad.numpy()
        compare(row, "losses of tokens", dtype, found, (float(exact), *gradients))


@needs("nf4")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(paddle: Any, on_gpu: bool, row: Row, kind: str) -> None:
    from sft_quant_nf4.codes import CODEBOOKS, quantize_blocks
    from sft_quant_nf4.layers import BlockLinear

    random = np.random.default_rng(6)
    weight = random.standard_normal((768, 512)).astype(np.float32)
    blocks = quantize_blocks(weight, kind, 64, False)
    layer, absmax = BlockLinear(blocks, None), blocks.absmax
    assert absmax is not None
    codes = np.stack([blocks.codes >> 4, blocks.codes & 15], 1).reshape(-1)
    exact = (CODEBOOKS[kind][codes].reshape(-1, 64) * absmax[:, None]).reshape(weight.shape)
    row(f"{kind} dequantized", int((layer.dequantize().numpy() != exact.T).sum()), "0 values differ")
    assert (layer.dequantize().numpy() == exact.T).all()
    x, slope = random.standard_normal((33, 512)), random.standard_normal((33, 768))
    for dtype in dtypes(on_gpu):
        given = tensor(paddle, x, dtype)
        y = layer(given)
        (y * tensor(paddle, slope, dtype).detach()).sum().backward()
        found = max(apart(y, x @ exact.T.astype(np.float64)), apart(given.grad, slope @ exact.astype(np.float64)))
        row(f"{kind} product and its gradient, {dtype}", found, 1e-2)


@needs("int8", "int4")
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 64), (4, 128)])
def test_weight_only(paddle: Any, on_gpu: bool, row: Row, bits: int, group: int | None) -> None:
    """Codes are a host's and paddle's own; products are those of the dequantized matrix, forward and backward, whether
    paddle's kernel computes them or dequantizing does."""
    from paddle.nn.quant import weight_quantize

    from sft_quant_nf4.codes import quantize_channels
    from sft_quant_nf4.kernels import Kernel, Packed, architecture, fits
    from sft_quant_nf4.layers import ChannelLinear

    random, kind = np.random.default_rng(8), f"int{bits}{f' in groups of {group}' if group else ''}"
    weight, largest = random.standard_normal((768, 512)).astype(np.float32), 2 ** (bits - 1) - 1
    in_groups = weight.reshape(768, -1, group or 512)
    scales = np.abs(in_groups).max(-1, keepdims=True) / np.float32(largest)
    whole = np.rint(in_groups / scales)
    exact = (whole * scales).reshape(768, 512)
    layer = ChannelLinear(quantize_channels(weight, bits, group), None)
    differ = int((layer.values(0, 768).numpy() != whole.reshape(768, 512)).sum())
    differ += int((layer.dequantize().numpy() != exact.T).sum())
    row(f"{kind}: codes, and values dequantized", differ, "0 differ")
    assert differ == 0
    if not on_gpu or fits(layer):
        # Paddle finds a scale of one where the largest numbers of each group are those of the type.
        given = paddle.to_tensor(np.ascontiguousarray(whole.reshape(768, 512).T)).astype("float16")
        wanted, _ = weight_quantize(
            given, algo=f"weight_only_int{bits}", arch=architecture() if on_gpu else 80, group_size=group or -1
        )
        differ = int((Packed(layer, "float16").codes.numpy() != wanted.numpy()).sum())
        row(f"{kind}: bytes of paddle's layout", differ, "0 differ")
        assert differ == 0
    x, slope = random.standard_normal((33, 512)), random.standard_normal((33, 768))
    for dtype in dtypes(on_gpu):
        said: list[str] = []
        layer = ChannelLinear(quantize_channels(weight, bits, group), None, Kernel(said.append))
        given = tensor(paddle, x, dtype)
        y = layer(given)
        (y * tensor(paddle, slope, dtype).detach()).sum().backward()
        found = max(apart(y, x @ exact.T.astype(np.float64)), apart(given.grad, slope @ exact.astype(np.float64)))
        how = f" ({said[0].partition(' are ')[2]})" if said else ""
        row(f"{kind}: product and its gradient, {dtype}{how}", found, 1e-5 if dtype == "float32" else 1e-2)
        assert (layer.dequantize().numpy() == exact.T).all()  # of paddle's layout too


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw(paddle: Any, row: Row, dtype: str) -> None:
    """Five steps of 70 tensors, clipped, against float64; 16-bit parameters by their masters."""
    from sft.settings.arguments import TrainingArguments
    from sft.training.adamw import AdamW
    from sft.training.groups import default_groups

    training, random, parameters, exact = TrainingArguments(weight_decay=0.1), np.random.default_rng(7), {}, {}
    for number in range(70):
        value = paddle.to_tensor(random.standard_normal((3 + number, 5)).astype(np.float32)).astype(dtype)
        parameters[str(number)] = paddle.base.framework.EagerParamBase.from_tensor(value)
        parameters[str(number)].stop_gradient = False
        exact[str(number)] = value.astype("float32").numpy().astype(np.float64)
    optimizer = AdamW(default_groups(parameters, 0.1), training)
    first, second = ({name: 0.0 * value for name, value in exact.items()} for _ in range(2))
    for step in range(1, 6):
        for name, parameter in parameters.items():
            parameter.grad = paddle.to_tensor(random.standard_normal(parameter.shape).astype(np.float32))
            gradient = 0.25 * parameter.grad.numpy().astype(np.float64)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            moved = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + training.adam_epsilon)
            exact[name] -= 1e-2 * (moved + 0.1 * exact[name])
        optimizer.step(1e-2, 0.25)
    state = optimizer.state()
    stepped = {name: state.get(f"{name}.master", parameters[name]) for name in exact}
    row(f"AdamW, 5 steps, {dtype}", max(apart(stepped[name], exact[name]) for name in exact), 1e-6)
