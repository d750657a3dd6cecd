"""The VeRA layer against its equation in float64; one shared pair; what trains, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft

Adapt = Callable[..., sft.Run]

IN, OUT, RANK = 12, 10, 3
SIZES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32),
}  # fmt: skip
"""(in, out) of the Linears of llama-tied-gqa, in each of its two blocks."""


def layers_of(run: sft.Run) -> dict[str, Any]:
    """Adapted layers by the target's Hugging Face name."""
    return {path: layer for path, layer in run.model.named_sublayers() if hasattr(layer, "vera_d")}


def plugin_of(run: sft.Run) -> Any:
    return run.plugins.manager.get_plugin("vera")


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_output_and_gradients_are_those_of_the_equation(paddle: Any, bias: bool) -> None:
    """y = xW + c + ((x·A) ⊙ d)·B ⊙ b over a pair that is wider than the layer; float32 is within 1e-5."""
    from sft_peft_vera.layer import SharedPair, VeraLinear

    generator = np.random.default_rng(1)
    shapes = {"W": (IN, OUT), "c": (OUT,), "A": (IN + 4, RANK), "B": (RANK, OUT + 5), "d": (RANK,), "b": (OUT,)}
    parts = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base = paddle.nn.Linear(IN, OUT, bias_attr=None if bias else False)
    base.weight.set_value(parts["W"])
    base.weight.stop_gradient = True
    if bias:
        base.bias.set_value(parts["c"])
        base.bias.stop_gradient = True
    layer = VeraLinear(base, IN, OUT, SharedPair(parts["A"], parts["B"]), 0.1, 0.0)
    layer.vera_d.set_value(parts["d"])
    layer.vera_b.set_value(parts["b"])
    x, g = (generator.standard_normal((2, 5, size)).astype(np.float32) for size in (IN, OUT))
    tensor = paddle.to_tensor(x, stop_gradient=False)
    y = layer(tensor)
    (y * paddle.to_tensor(g)).sum().backward()

    p = {name: part.astype(np.float64) for name, part in parts.items()}
    flat, upstream = x.reshape(-1, IN).astype(np.float64), g.reshape(-1, OUT).astype(np.float64)
    A, B = p["A"][:IN], p["B"][:, :OUT]
    inner, scaled = flat @ A, (upstream * p["b"]) @ B.T
    expected = {
        "y": flat @ p["W"] + (p["c"] if bias else 0.0) + (inner * p["d"]) @ B * p["b"],
        "x": upstream @ p["W"].T + (scaled * p["d"]) @ A.T,
        "d": (inner * scaled).sum(axis=0),
        "b": (upstream * ((inner * p["d"]) @ B)).sum(axis=0),
    }
    found = {"y": y, "x": tensor.grad, "d": layer.vera_d.grad, "b": layer.vera_b.grad}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy().reshape(value.shape), value, atol=5e-5, rtol=1e-5, err_msg=name)
    assert layer.base.weight.grad is None


def test_dropout_is_on_the_updates_input_while_training(paddle: Any) -> None:
    """With identities and ones the update is dropout(x): each element is gone, or divided by 1 - p."""
    from sft_peft_vera.layer import SharedPair, VeraLinear

    base = paddle.nn.Linear(64, 64)
    base.weight.set_value(np.zeros((64, 64), np.float32))
    base.bias.set_value(np.full(64, 3.0, np.float32))
    layer = VeraLinear(base, 64, 64, SharedPair(*[np.eye(64, dtype=np.float32)] * 2), 1.0, 0.25)
    layer.vera_b.set_value(np.ones(64, np.float32))
    x = np.random.default_rng(3).uniform(1, 2, (50, 64)).astype(np.float32)
    layer.train()
    update = layer(paddle.to_tensor(x)).numpy() - 3.0
    kept = update != 0
    np.testing.assert_allclose(update[kept], (x / 0.75)[kept], rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.04  # 3,200 draws: the deviation is 0.008
    layer.eval()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), x + 3.0, rtol=1e-6)


# --- the pair -----------------------------------------------------------------------------------------------


def test_trap_one_pair_for_all_layers_and_not_one_a_layer(adapt: Adapt) -> None:
    """Layers of one width share the tensor itself, and each slice is the beginning of the one pair."""
    run = adapt(vera_rank=RANK)
    pair = plugin_of(run).pair
    a, b = pair.a.numpy(), pair.b.numpy()
    assert (a.shape, b.shape) == ((48, RANK), (RANK, 48))
    shared: dict[tuple[str, int], set[int]] = {}
    for name, layer in layers_of(run).items():
        size, out = SIZES[name.partition(".")[2].split(".", 2)[2]]
        assert (layer.in_features, layer.out_features) == (size, out)
        np.testing.assert_array_equal(layer.pair_A.numpy(), a[:size])
        np.testing.assert_array_equal(layer.pair_B.numpy(), b[:, :out])
        shared.setdefault(("a", size), set()).add(id(layer.pair_A))
        shared.setdefault(("b", out), set()).add(id(layer.pair_B))
    assert len(shared) == 5
    assert {len(objects) for objects in shared.values()} == {1}


def test_the_pair_is_kaiming_uniform(adapt: Adapt) -> None:
    """Kaiming's U(±√(6 / fan_in)), as PEFT draws it: fan_in of A [r, in] is in, that of B [out, r] is r."""
    pair = plugin_of(adapt(vera_rank=64)).pair
    for half, fan in ((pair.a, 48), (pair.b, 64)):
        values, bound = half.numpy(), math.sqrt(6 / fan)
        assert values.dtype == np.float32
        assert 0.99 * bound < np.abs(values).max() <= bound  # 3,072 draws
        assert abs(values.mean()) < 5 * bound / math.sqrt(3 * values.size)
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.1)


def test_the_pair_depends_on_the_seed_alone(adapt: Adapt, models: Path) -> None:
    """Not on which layers of these widths are adapted, nor on what was drawn before."""
    np.random.seed(7)
    first = plugin_of(adapt(seed=1)).pair
    again = plugin_of(adapt(seed=1, vera_target_modules=["up_proj", "down_proj"])).pair
    other = plugin_of(adapt(seed=2)).pair
    for half in ("a", "b"):
        np.testing.assert_array_equal(getattr(first, half).numpy(), getattr(again, half).numpy())
        assert not np.isclose(getattr(first, half).numpy(), getattr(other, half).numpy()).all()


# --- what trains, and how it begins -------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "asked"), [(8, []), (5, ["q_proj", "down_proj"]), (1, [r".*layers\.1\..*"])])
def test_trap_only_the_two_vectors_train_and_the_count_is_printed(
    train: Any, paddle: Any, rank: int, asked: list[str]
) -> None:
    """Σ (r + out) over the adapted layers."""
    names = [f"model.layers.{n}.{place}" for n in (0, 1) for place in SIZES]
    if asked:
        names = [name for name in names if name.rpartition(".")[2] in asked or (rank == 1 and "layers.1" in name)]
    expected = sum(rank + SIZES[name.split(".", 3)[3]][1] for name in names)
    said: list[str] = []
    trained: list[set[str]] = []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            trained.append({name for name, p in run.model.named_parameters() if not p.stop_gradient})

    summary = train(plugins=(Look,), say=said.append, vera_rank=rank, vera_target_modules=asked, max_steps=1)
    assert trained == [{f"{name}.vera_{which}" for name in names for which in "bd"}]
    assert summary.trainable_parameters == expected
    assert f"vera: {len(names)} layers, rank {rank}, {expected:,} trainable parameters" in said


@pytest.mark.parametrize("case", ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"])
def test_trap_b_begins_at_zero_and_d_at_a_tenth_so_the_model_is_unchanged(
    adapt: Adapt, models: Path, logits_of: Any, case: str
) -> None:
    from sft.models.kernels import use_kernels
    from sft.models.loading import load_model, open_model

    run = adapt(model_name_or_path=str(models / case))
    for layer in layers_of(run).values():
        assert not layer.vera_b.numpy().any()
        np.testing.assert_array_equal(layer.vera_d.numpy(), np.full(8, 0.1, np.float32))
    ids = load_file(models / case / "reference.safetensors")["input_ids"]
    base = load_model(open_model(models / case))
    use_kernels(base, run.model.kernels)
    np.testing.assert_array_equal(logits_of(run.model, ids), logits_of(base, ids))


def test_d_begins_where_the_setting_says(adapt: Adapt) -> None:
    assert {float(layer.vera_d.numpy()[0]) for layer in layers_of(adapt(vera_d_initial=0.5)).values()} == {0.5}


def test_training_changes_the_vectors_and_neither_the_pair_nor_the_base(train: Any, models: Path) -> None:
    before = load_file(models / "llama-tied-gqa" / "model.safetensors")
    pairs: list[np.ndarray] = []

    class Compare(sft.Plugin):
        name = "compare"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            pairs.extend(half.numpy() for half in (plugin_of(run).pair.a, plugin_of(run).pair.b))

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            pairs.extend(half.numpy() for half in (plugin_of(run).pair.a, plugin_of(run).pair.b))
            for name, parameter in run.model.named_parameters():
                if "vera_" in name:
                    assert not np.isclose(parameter.numpy(), 0.1 if name.endswith("_d") else 0.0, atol=1e-6).all()
                    continue
                original = before[name.replace(".base.", ".")]
                transposed = original.ndim == 2 and "embed" not in name
                np.testing.assert_array_equal(parameter.numpy(), original.T if transposed else original)

    summary = train(plugins=(Compare,), weight_decay=0.1)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.05
    np.testing.assert_array_equal(pairs[0], pairs[2])
    np.testing.assert_array_equal(pairs[1], pairs[3])


@pytest.mark.parametrize("asked", ["q_porj", "lm_head"])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(train: Any, tmp_path: Path, asked: str) -> None:
    with pytest.raises(sft.UsageError, match="matches no layer; this model has q_proj, k_proj, v_proj, o_proj"):
        train(vera_target_modules=asked)
    assert not (tmp_path / "out").exists()
