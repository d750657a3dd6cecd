"""Scores against the model's formula in float64 by numpy: gradients of the answer one difference at a time, products
with those of records as one more. Which step counts at which checkpoint, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.testing import needs, write_data
from sft_influence.tracing import METHODS, passes_of, shares, trace

RECORDS = [
    {"src": "type#coat", "tgt": "A coat for you."},
    {"src": "type#skirt", "tgt": "A long skirt."},
    {"src": "type#shirt", "tgt": "No."},
    {"src": "type#coat*warm", "tgt": "Warm."},
]
SETTINGS: dict[str, Any] = {
    "plugin": ["lora"],
    "lora_rank": 1,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
}
Tensors = dict[str, np.ndarray]


class Llama:
    """The loss of a document in float64, by the formulas of Llama, from the files of a model and an adapter of PEFT."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self.config = json.loads((model / "config.json").read_text())
        held = load_file(model / "model.safetensors")
        self.weights = {k.removeprefix("model."): v.astype(np.float64) for k, v in held.items()}
        said = json.loads((adapter / "adapter_config.json").read_text())
        self.scale = said["lora_alpha"] / said["r"]
        stored = load_file(adapter / "adapter_model.safetensors")
        self.adapter = {k.removeprefix("base_model.model.model."): v.astype(np.float64) for k, v in stored.items()}

    def loss(self, batch: sft.Batch, adapter: Tensors | None = None) -> float:
        """The sum over the targets of the batch's one document."""
        config, adapter = self.config, self.adapter if adapter is None else adapter
        ids, labels = batch.input_ids[0], batch.labels[0]
        heads, size = config["num_attention_heads"], config["head_dim"]
        group = heads // config["num_key_value_heads"]
        frequencies = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = np.tile(np.arange(len(ids))[:, None] * frequencies, 2)[:, None]

        def linear(x: np.ndarray, name: str) -> np.ndarray:
            weight = self.weights[f"{name}.weight"]
            if f"{name}.lora_A.weight" in adapter:
                weight = weight + self.scale * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
            return x @ weight.T

        def norm(x: np.ndarray, name: str) -> np.ndarray:
            rms = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
            return x / rms * self.weights[f"{name}.weight"]

        def turned(x: np.ndarray) -> np.ndarray:
            half = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
            return x * np.cos(angles) + half * np.sin(angles)

        def softmax(x: np.ndarray) -> np.ndarray:
            powers = np.exp(x - x.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)

        x = self.weights["embed_tokens.weight"][ids]
        future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        for block in range(config["num_hidden_layers"]):
            at = f"layers.{block}."
            y = norm(x, f"{at}input_layernorm")
            q, k, v = (linear(y, f"{at}self_attn.{one}_proj").reshape(len(ids), -1, size) for one in "qkv")
            q, k = turned(q), np.repeat(turned(k), group, 1)
            scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(size) + future
            mixed = np.einsum("hst,thd->shd", softmax(scores), np.repeat(v, group, 1))
            x = x + linear(mixed.reshape(len(ids), -1), f"{at}self_attn.o_proj")
            y = norm(x, f"{at}post_attention_layernorm")
            gate = linear(y, f"{at}mlp.gate_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        logits = norm(x, "norm") @ self.weights["embed_tokens.weight"].T
        places = np.flatnonzero(labels != -100)
        return float(-np.log(softmax(logits[places])[np.arange(len(places)), labels[places]]).sum())

    def gradient(self, batch: sft.Batch, step: float = 1e-5) -> Tensors:
        """Of the loss in each value of the adapter, by central differences."""
        found = {}
        for name, value in self.adapter.items():
            found[name] = np.zeros_like(value)
            for place in np.ndindex(value.shape):
                bump = np.zeros_like(value)
                bump[place] = step
                above, below = ({**self.adapter, name: value + sign * bump} for sign in (1, -1))
                found[name][place] = (self.loss(batch, above) - self.loss(batch, below)) / (2 * step)
        return found

    def along(self, batch: sft.Batch, direction: Tensors, step: float = 1e-5) -> float:
        """The gradient of the loss times ``direction``."""
        size = np.sqrt(sum((one**2).sum() for one in direction.values()))
        ends = ({k: v + sign * step / size * direction[k] for k, v in self.adapter.items()} for sign in (1, -1))
        above, below = (self.loss(batch, adapter) for adapter in ends)
        return (above - below) / (2 * step) * size


@pytest.fixture(scope="module")
def run_folder(paddle: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("influence")
    data = write_data(folder / "data", RECORDS)
    named = {"model_name_or_path": str(base_model), "dataset_name_or_path": str(data)}
    sft.run({**SETTINGS, **named, "output_dir": str(folder / "out")}, say=lambda text: None)
    return folder / "out"


def second_moments(checkpoint: Path, step: int) -> Tensors:
    """1/(√v̂ + ε) of each value of the adapter, in PEFT's names and layout, from the optimizer's file and the formula of
    the paper: v̂ = v / (1 - β₂ᵗ)."""
    (path,) = (checkpoint / "trainer").glob("optimizer*.safetensors")
    found = {}
    for key, value in load_file(path).items():
        if key.endswith(".moment2"):
            name = f"{key.removeprefix('model.').removesuffix('.moment2')}.weight"
            found[name] = 1 / (np.sqrt(value.astype(np.float64).T / (1 - 0.999**step)) + 1e-8)
    return found


@needs("lora")
@pytest.mark.parametrize(
    ("checkpoints", "method"),
    [([6], "tracin"), *(pytest.param([3, 6], method, marks=pytest.mark.slow) for method in METHODS)],
)
def test_scores_are_those_of_the_formula_in_float64(
    run_folder: Path, base_model: Path, checkpoints: list[int], method: str
) -> None:
    with sft.reopened(run_folder, lambda text: None) as opened:
        assert opened.checkpoints == [3, 6]
        answer = opened.answered([sft.Turn("user", "type#coat")], sft.Turn("assistant", "A coat."))
        weights = shares(opened.steps(), checkpoints, len(opened))
        found = trace(opened, [answer, answer], checkpoints, [0, 2, 3], weights, method)
        expected, losses = np.zeros(4), []
        for row, step in enumerate(checkpoints):
            folder = run_folder / f"checkpoint-{step}"
            llama = Llama(base_model, folder)
            losses.append(llama.loss(answer) / answer.target_tokens)
            direction = {name: one / answer.target_tokens for name, one in llama.gradient(answer).items()}
            if method == "adam":
                scales = second_moments(folder, step)
                assert scales.keys() == direction.keys()
                direction = {name: one * scales[name] for name, one in direction.items()}
            expected += weights[row] * [llama.along(opened.batch(number), direction) for number in range(4)]
    assert found.passes == passes_of(weights, [0, 2, 3]) > 0
    assert found.losses[:, 0] == pytest.approx(losses, rel=1e-5)
    assert found.scores.shape == (2, 3)
    for scores in found.scores:
        assert scores == pytest.approx(expected[[0, 2, 3]], abs=2e-5 * np.abs(expected).max())


def test_each_step_counts_once_at_the_checkpoint_nearest_to_it() -> None:
    steps = [sft.PastStep(n, records, 0.1 * n, 10.0) for n, records in enumerate([(0, 1), (1, 2), (0, 2), (1,)], 1)]
    found = shares(steps, [2, 4], 4)
    assert found == pytest.approx(np.array([[0.01 + 0.03, 0.01 + 0.02, 0.02 + 0.03, 0], [0, 0.04, 0, 0]]))
    # Step 3 leads from the weights after step 2 to those after step 3: its gradients are those of the earlier ones.
    assert shares(steps, [2, 3], 4) == pytest.approx(found)
    assert shares(steps, [1], 4).sum() == pytest.approx(found.sum())
    assert passes_of(found, [1, 3]) == 2


def test_a_record_twice_in_a_step_counts_twice() -> None:
    found = shares([sft.PastStep(1, (1, 1, 0), 0.5, 5.0), sft.PastStep(2, (0,), 0.5, 0.0)], [1], 2)
    assert found.tolist() == [[0.1, 0.2]]


def test_a_step_counts_as_far_as_it_went() -> None:
    """One that was clipped, one that was skipped, and one that was neither."""
    steps = [
        sft.PastStep(1, (0, 1), 0.5, 5.0, 0.25),
        sft.PastStep(2, (1, 2), 0.5, 5.0, 0.0),
        sft.PastStep(3, (0,), 0.5, 5.0),
    ]
    assert shares(steps, [3], 3).tolist() == [[0.125, 0.025, 0.0]]


class Keeps(sft.AdamW):
    """Keeps no moments."""

    def new_state(self, name: str, value: Any) -> dict[str, Any]:
        return {}

    def update(self, gradients: dict[str, Any], rate: float, decay: float) -> None:
        for name, gradient in gradients.items():
            self.values[name].subtract_(gradient * rate)


class Plain(sft.Plugin):
    name = "plain-steps"
    api_version = ">=1.1,<2"

    @sft.hookimpl
    def sft_optimizer(self, run: sft.Run, groups: list[sft.ParameterGroup]) -> sft.Optimizer:
        return Keeps(groups, run.settings.training)


@pytest.mark.slow
def test_adam_is_refused_where_nothing_keeps_second_moments(train: Callable[..., sft.Summary], tmp_path: Path) -> None:
    train("out", (Plain,), max_steps=2, save_strategy="steps", save_steps=2)
    with sft.reopened(tmp_path / "out", lambda text: None, plugins=(Plain,)) as opened:
        answer = opened.answered([sft.Turn("user", "a")], sft.Turn("assistant", "b"))
        weights = shares(opened.steps(), [2], len(opened))
        with pytest.raises(sft.UsageError, match="--method adam needs the second moments that AdamW keeps"):
            trace(opened, [answer], [2], [0], weights, "adam")
        assert np.isfinite(trace(opened, [answer], [2], [0], weights).scores).all()


@pytest.mark.slow
def test_of_one_small_step_scores_are_what_leaving_a_record_out_does(
    train: Callable[..., sft.Summary], tmp_path: Path
) -> None:
    """Retrained without each record, by plain gradient descent: the others then share what the step weighs."""
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 3) + "."} for n in range(8)]
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0, "learning_rate": 2e-4}

    def learned(name: str, without: int | None) -> Path:
        left = [{**one, "weight": 1e-6} if n == without else one for n, one in enumerate(records)]
        data = write_data(tmp_path / f"data-{name}", left)
        train(name, (Plain,), dataset_name_or_path=str(data), lr_scheduler_type="constant", **settings)
        return tmp_path / name

    def loss(folder: Path) -> float:
        with sft.reopened(folder, lambda text: None, plugins=(Plain,)) as opened:
            answer = opened.answered([sft.Turn("user", "type#9")], sft.Turn("assistant", "A coat for me."))
            return float(opened.cross_entropy(answer)) / answer.target_tokens

    whole = learned("whole", None)
    with sft.reopened(whole, lambda text: None, plugins=(Plain,)) as opened:
        answer = opened.answered([sft.Turn("user", "type#9")], sft.Turn("assistant", "A coat for me."))
        (step,) = opened.steps()
        weights = shares([step], [1], len(opened))
        scores = trace(opened, [answer], [1], range(len(records)), weights).scores[0]
        sizes = np.array([opened.batch(number).target_tokens for number in range(len(records))])
    assert step.weight == sizes.sum()
    grows = step.weight / (step.weight - sizes)
    expected = scores * grows - scores.sum() * (grows - 1)
    effects = np.array([loss(learned(f"without-{n}", n)) for n in range(len(records))]) - loss(whole)
    assert effects == pytest.approx(expected, abs=0.05 * np.abs(expected).max())
