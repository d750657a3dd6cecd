"""What a GPU computes under automatic casts, emulated on a CPU: in which types, and what must not be rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.data.batches import assemble
from sft.precision import Precision
from sft.seams import Example
from sft.testing import emulated_autocast

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = json.loads((FIXTURES / "published.json").read_text(encoding="utf-8"))
CONFIGS = {
    **{path.parent.name: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/*/config.json"))},
    **{name: entry["config"] for name, entry in PUBLISHED.items()},
}


def rotaries_of(config: dict[str, Any]) -> Any:
    from sft.models.families.known import family_of

    return family_of(config, "here").architecture(config, "here").rotaries


@pytest.mark.parametrize("case", CONFIGS)
def test_angles_are_no_matter_of_16_bits(paddle: Any, case: str) -> None:
    """Rounded to bfloat16 an angle is off by 0.8 at position 256 and by 19 at 4,096; float32 has 2e-4 of it there."""
    from sft.models.turning import rotate, tables

    places = np.array([[1, 255, 256, 2047, 4095]])
    lengths = np.full_like(places, 4096)
    for rotary in rotaries_of(CONFIGS[case]):
        x = paddle.ones([1, 5, 1, rotary.size]).astype("bfloat16")
        with emulated_autocast("bfloat16"):
            cosines, sines = tables(rotary, places, lengths)
            turned = rotate(x, rotary, cosines, sines)
        frequencies, scale = rotary.frequencies(4096)
        angles = places[0, :, None] * frequencies
        first = slice(0, None, 2) if rotary.interleaved else slice(0, rotary.size // 2)
        found = [table.numpy()[0, :, 0, first] for table in (cosines, sines)]
        np.testing.assert_allclose(found[0], np.cos(angles) * scale, atol=5e-4 * scale)
        np.testing.assert_allclose(found[1], -np.sin(angles) * scale, atol=5e-4 * scale)
        expected = (np.cos(angles) - np.sin(angles)) * scale
        np.testing.assert_allclose(turned.astype("float32").numpy()[0, :, 0, first], expected, atol=1e-2 * scale)


class Noting:
    """An attention that notes the types of what it gets."""

    packed, describes_padding, caps = True, False, True

    def __init__(self, own: Any) -> None:
        self.own, self.types = own, set()  # type: ignore[var-annotated]
        self.mask = own.mask

    def attend(self, query: Any, key: Any, value: Any, mask: Any, *more: Any) -> Any:
        self.types |= {str(one.dtype) for one in (query, key, value)}
        wide = (one.astype("float32") for one in (query, key, value))  # a CPU's has no 16 bits
        return self.own.attend(*wide, mask, *more).astype(value.dtype)


def batch_of(vocabulary: int) -> Any:
    generator = np.random.default_rng(0)
    records = [Example(generator.integers(3, vocabulary, 12).tolist(), [1] * 12) for _ in range(2)]
    return assemble([records], pad_id=0)


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied"])
@pytest.mark.parametrize(
    ("weights", "frozen"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
    ids=["O1", "frozen", "O2"],
)
def test_types_are_those_of_the_products(paddle: Any, models: Path, case: str, weights: str, frozen: str) -> None:
    """Attention gets three tensors of 16 bits, or paddle's kernels would not take them; the loss is float32; and
    each norm is rounded once for all the products that read it. Over frozen matrices of 16 bits the norms train."""
    from sft.models.loading import load_model, open_model
    from sft.training.loop import Learning
    from sft.training.objective import RunObjective
    from sft.training.wide_sums import WideSums

    precision = Precision("bfloat16", weights, frozen)
    model = load_model(open_model(models / case), precision=precision)
    model.attention = Noting(model.attention)
    model.train()
    for parameter in model.parameters():
        parameter.stop_gradient = frozen != weights and parameter.ndim > 1
    batch = batch_of(model.architecture.vocabulary)
    run: Any = type("Run", (), {"model": model, "precision": precision, "hook": None, "objective": RunObjective()})
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    learning = Learning(run, 1.0 / 24, is_idle=True, sums=WideSums(trained))
    with emulated_autocast("bfloat16") as factors:
        hidden = learning.forward(batch)
        entered = {one.data_ptr() for one in factors if one.shape == hidden.shape}
        loss = learning.loss(hidden, batch)
        with paddle.amp.auto_cast(enable=False):  # as a run has it: only what goes forward is cast
            learning.backward(loss)
    assert model.attention.types == {"paddle.bfloat16"}
    assert (hidden.dtype, loss.dtype) == (paddle.bfloat16, paddle.float32)
    assert {str(parameter.grad.dtype) for parameter in trained} == {"paddle.float32"}
    assert {str(one.dtype) for one in model.parameters() if one.ndim > 1} == {f"paddle.{frozen}"}
    # The inputs of q, k and v; of gate and up; and of o, where heads and head size give as much.
    query = model.architecture.heads * model.architecture.head_size
    assert len(entered) == len(model.architecture.blocks) * (3 if query == hidden.shape[-1] else 2)
