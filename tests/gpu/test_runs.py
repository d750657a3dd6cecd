"""On a GPU: whole runs, against the same on a CPU, against themselves, and how fast they are."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from device_calls import NO_NATIVE_CODE, CountStep
from gpu_measures import apart

import sft
from sft.commands.generate import USES
from sft.conversations import Turn
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer
from sft.inference.open import Opened, opened, settings_for
from sft.models.generation import answers
from sft.settings.arguments import Settings
from sft.testing import make_model, needs, read_metrics, write_data

pytestmark = pytest.mark.gpu

Row = Callable[..., None]
O2 = {"bf16": True, "fp16_opt_level": "O2"}


@pytest.fixture
def device(on_gpu: bool) -> str:
    return "gpu" if on_gpu else "cpu"


@pytest.fixture
def losses(train: Any, tmp_path: Path, device: str) -> Callable[..., list[float]]:
    """The loss of each of five steps of a small model that trains whole."""

    def run(name: str, **settings: Any) -> list[float]:
        common = {"max_steps": 5, "logging_steps": 1, "do_eval": False, "learning_rate": 1e-3, "device": device}
        train(name, **{**common, **settings})
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    return run


def distance(one: list[float], other: list[float]) -> float:
    return float(np.abs(np.asarray(one) / np.asarray(other) - 1).max())


def test_losses_are_those_of_a_cpu(losses: Any, gpu: Any, row: Row) -> None:
    row("losses of 5 steps in float32, to a CPU's", distance(losses("gpu"), losses("cpu", device="cpu")), 1e-4)


@pytest.mark.parametrize(("narrow", "tolerance"), [("bf16", 2e-2), ("fp16", 5e-3)])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_losses_in_16_bits(losses: Any, gpu: Any, row: Row, narrow: str, tolerance: float, level: str) -> None:
    wide = losses("wide")
    found = losses(narrow, **{narrow: True, "fp16_opt_level": level, "require_precision": True})
    row(f"losses of 5 steps, {narrow} {level}, to float32", distance(found, wide), tolerance)


def test_micro_batches_add_up(losses: Any, on_gpu: bool, row: Row) -> None:
    """Eight micro-batches of one row are one of eight, also where 16-bit weights train."""
    common = O2 if on_gpu else {}
    one = losses("one", per_device_train_batch_size=8, **common)
    eight = losses("eight", per_device_train_batch_size=1, gradient_accumulation_steps=8, **common)
    row("8 micro-batches to one", distance(eight, one), 3e-3)


def test_gradients_add_up_in_float32(
    train: Any, tmp_path: Path, device: str, on_gpu: bool, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 128 micro-batches of one row are those of one of 128, also of 16-bit matrices. Each gradient is rounded
    to bfloat16 as it is made, which takes 1.6e-3 of its size; sums of 128 would be off by eight times as much."""
    from sft.training import loop

    found: list[dict[str, Any]] = []
    outcome = loop.outcome

    def look(strategy: Any, loss: Any, values: Any, stepped: Any) -> Any:
        matrices = {name: one for name, one in stepped.items() if one.ndim == 2 and ".layers." in name}
        found.append({name: one.grad.astype("float32").numpy() for name, one in matrices.items()})
        return outcome(strategy, loss, values, stepped)

    monkeypatch.setattr(loop, "outcome", look)
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 7) + "."} for n in range(128)]
    common = {"dataset_name_or_path": str(write_data(tmp_path / "data", records)), "max_steps": 1, "device": device}
    for rows in (128, 1):
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 128 // rows}
        train(f"{rows}", do_eval=False, **common, **settings, **(O2 if on_gpu else {}))
    one, many = found
    assert one.keys() == many.keys() != set()
    off = max(apart(many[name], one[name]) for name in one)
    row("gradients of 128 micro-batches to those of one", off, 6e-3 if on_gpu else 1e-5)


@needs("lora")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_types_in_bfloat16(
    train: Any, on_gpu: bool, device: str, row: Row, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """Of what goes through a model, for the record; what trains, its gradients and the losses are float32."""
    found: dict[str, str] = {}

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_started(self, run: sft.Run) -> None:
            block = run.model.model.layers[0]
            parts = {
                "norm": block.input_layernorm,
                **{kind[0]: getattr(block.self_attn, kind) for kind in ("q_proj", "k_proj", "v_proj")},
                "block": block,
                "last": run.model.model.norm,
            }
            for name, part in parts.items():
                part.register_forward_post_hook(lambda layer, given, y, name=name: found.update({name: short(y)}))
            kernels, before = run.model.kernels, run.model.kernels.cross_entropy

            def cross_entropy(logits: Any, labels: Any) -> Any:
                losses = before(logits, labels)
                found.update({"logits": short(logits), "losses": short(losses[0])})
                return losses

            monkeypatch.setattr(kernels, "cross_entropy", cross_entropy)
            self.parameter = next(p for p in run.model.parameters() if not p.stop_gradient)
            found["trains"] = short(self.parameter)
            self.parameter.register_hook(lambda gradient: found.update({"gradient": short(gradient)}))

    def short(tensor: Any) -> str:
        return str(tensor.dtype).rpartition(".")[2]

    train(plugins=(Look,), plugin=["lora"], device=device, bf16=True, fp16_opt_level=level, max_steps=1, do_eval=False)
    row(f"types, bf16 {level}, LoRA", ", ".join(f"{name} {dtype}" for name, dtype in found.items()))
    assert found["trains"] == found["gradient"] == "float32"
    assert found["losses"] in ("float32", "float64")
    assert {found[one] for one in "qkv"} == {"bfloat16" if on_gpu else "float32"}  # a CPU narrows within a product


def test_an_overflow_halves_the_scale_and_skips_the_step(train: Any, gpu: Any, tmp_path: Path, row: Row) -> None:
    said: list[str] = []
    train(
        "out", say=said.append, device="gpu", fp16=True, scale_loss=2.0**60, max_steps=3, logging_steps=1, do_eval=False
    )
    skipped = [line for line in said if "float16 overflow, skipped" in line]
    assert len(skipped) == 3
    assert f"the loss scale is now {2.0**57:g}" in skipped[-1]
    row("float16 overflow", "3 steps skipped, the scale halved each time", "exact")


@needs("lora")
def test_going_on_is_as_if_it_had_not_stopped(train: Any, tmp_path: Path, device: str, row: Row) -> None:
    """2 + 2 steps and 4. On a GPU to the last bit with ``deterministic``; without it is measured."""
    for deterministic in (False, True):
        common = {"plugin": ["lora"], "device": device, "logging_steps": 1, "do_eval": False, "save_strategy": "steps"}
        common |= {"save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        common |= {"deterministic": deterministic}
        name = f"{deterministic}"
        train(f"{name}-whole", max_steps=4, **common)
        train(f"{name}-first", max_steps=2, **common)
        checkpoint = str(next((tmp_path / f"{name}-first").glob("checkpoint*")))
        train(f"{name}-second", max_steps=4, resume_from_checkpoint=checkpoint, **common)
        whole, second = (read_metrics(tmp_path / f"{name}-{part}")[-1]["loss"] for part in ("whole", "second"))
        exact = deterministic or device == "cpu"
        row(
            f"2 + 2 steps to 4{', deterministic' if deterministic else ''}",
            abs(whole / second - 1),
            0.0 if exact else 1e-3,
        )


@contextlib.contextmanager
def opened_as_for_answers(
    model: Path, where: str, plugins: list[str], **given: Any
) -> Iterator[tuple[Opened, Settings]]:
    """A model as ``sft generate`` opens it."""
    given = {"device": where, "model_name_or_path": str(model), **given}
    settings, active = settings_for(None, plugins, given, USES)
    with opened(settings, active, None, lambda text: None) as found, found.precision.autocast():
        yield found, settings


class Ids:
    """A tokenizer whose texts are ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pad_id, self.stop_ids = tokenizer.pad_id, tokenizer.stop_ids

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


CASES = ["llama-tied-gqa", "qwen2-untied", "mistral-gqa", "gemma-tied"]
ANSWERS = [
    "A red coat.",
    "One skirt, long and warm.",
    "Nothing at all!",
    "The shirt that you wear.",
    "Blue",
    "For her.",
]


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_a_cpu(
    train: Any, cases: Path, tmp_path: Path, device: str, row: Row, case: str
) -> None:
    """In bfloat16, to a CPU's in float32, token by token. The model has learned what it answers: of one that has not,
    the next token is a matter of the last digit."""
    records = [{"src": f"type#{n}", "tgt": text} for n, text in enumerate(ANSWERS)]
    data = str(write_data(tmp_path / "data", records))
    common = {"model_name_or_path": str(cases / case), "dataset_name_or_path": data, "device": device}
    train("learned", max_steps=80, learning_rate=1e-2, logging_steps=1, do_eval=False, **common)
    assert read_metrics(tmp_path / "learned")[-1]["loss"] < 0.1
    found = []
    for where, plugins, more in (("cpu", NO_NATIVE_CODE, {}), (device, [], {"bf16": True})):
        with opened_as_for_answers(tmp_path / "learned", where, plugins, max_new_tokens=32, **more) as (it, settings):
            prompts = [encode_prompt([Turn("user", record["src"])], it.tokenizer) for record in records]
            texts = answers(it.model, cast(Any, Ids(it.tokenizer)), prompts, settings.generation, 0)
            found.append([text.split() for text in texts])
    pairs = [pair for texts in zip(*found, strict=True) for pair in zip_longest(*texts)]
    assert len(pairs) > 3 * len(records)
    unlike = sum(one != other for one, other in pairs) / len(pairs)
    row(f"tokens of greedy answers in bfloat16 unlike a CPU's in float32, {case}", unlike, 0.05)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_16_bits_are_those_of_a_cpu_in_float32(
    paddle: Any, cases: Path, device: str, row: Row, case: str
) -> None:
    """Of prompts, and of tokens that follow over kept keys, as an answer reads them; of random models. A CPU rounds the
    factors of products and is off by 1.3e-2; a GPU rounds what comes out of them, too."""
    from sft.models.cache import CachedReading

    ids = np.random.default_rng(4).integers(3, 60, (3, 28))
    found = []
    for where, plugins, more in (("cpu", NO_NATIVE_CODE, {}), (device, [], {"bf16": True})):
        with opened_as_for_answers(cases / case, where, plugins, **more) as (it, _), paddle.no_grad():
            reading = CachedReading(it.model.architecture, np.array([0, 3, 7]), it.model.kernels)
            logits = []
            for new in (ids[:, :20], *np.split(ids[:, 20:], 8, axis=1)):
                reading.expect(new.shape[1])
                hidden = it.model.hidden_states(it.model.embed(paddle.to_tensor(new)), reading)
                logits.append(it.model.lm_head(hidden[:, -1:]).astype("float32").numpy())
            found.append(np.concatenate(logits, axis=1))
    row(f"logits in bfloat16, to a CPU's in float32, {case}", apart(found[1], found[0]), 5e-2)


@needs("zero-padding")
@pytest.mark.parametrize("plugins", [pytest.param(["lora"], marks=needs("lora")), []], ids=["lora", "full"])
def test_speed_waits_and_kernels(
    train: Any, tmp_path: Path, on_gpu: bool, device: str, row: Row, plugins: list[str]
) -> None:
    """Steps of two micro-batches of two packed rows: of 2,048 tokens, through up to 8 layers of 1,024, on a GPU; of 512
    through a small model on a CPU."""
    width, shape = 512, dict[str, int]()
    if on_gpu:
        width, shape = 2048, {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
        shape["num_key_value_heads"] = 4
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 40) + "."} for n in range(1200)]
    data = write_data(tmp_path / "data", records)
    kernels, what = [], plugins[0] if plugins else "full"
    for layers in (4, 8) if on_gpu else (2, 4):
        model = make_model(
            tmp_path / f"model-{layers}", num_hidden_layers=layers, max_position_embeddings=width, **shape
        )
        common = {"model_name_or_path": str(model), "dataset_name_or_path": str(data), "device": device}
        common |= {"max_length": width, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        common |= {"max_steps": 5, "logging_steps": 100, "do_eval": False, "bf16": on_gpu}
        plugin = [*plugins, "zero-padding", *NO_NATIVE_CODE]
        train(f"out-{layers}", plugins=(CountStep, Watch), plugin=plugin, **common)
        assert [[rows for rows, _ in step] for step in Watch.steps] == [[2, 2]] * 5
        full = sum(tokens for step in Watch.steps for _, tokens in step) / (20 * width)
        row(f"padding in rows of {width:,} tokens, {what}, {layers} layers", 1 - full, 0.1)
        kernels.append(CountStep.calls.kernels.total())
        row(f"tokens/s, {what}, {layers} layers", f"{max(Watch.speeds):,.0f}")
        row(f"waits a step, {what}, {layers} layers", float(len(CountStep.calls.waits)), 2.0)
    # The second model has half of its layers more, and both micro-batches of a step go through them.
    row(f"kernels a layer and micro-batch, {what}", (kernels[1] - kernels[0]) / layers)


class Watch(sft.Plugin):
    """Of each step the rows and tokens of its micro-batches, and tokens a second."""

    name = "watch"
    api_version = 1
    steps: list[list[tuple[int, int]]]
    speeds: list[float]

    @sft.hookimpl
    def sft_run_started(self, run: sft.Run) -> None:
        type(self).steps, type(self).speeds = [], []
        self._batches, self._began = list[tuple[int, int]](), time.monotonic()

    @sft.hookimpl
    def sft_micro_batch(self, run: sft.Run, batch: sft.Batch) -> None:
        self._batches.append((len(batch.input_ids), batch.tokens))

    @sft.hookimpl
    def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
        now = time.monotonic()
        self.steps.append(self._batches)
        self.speeds.append(record["tokens"] / (now - self._began))
        self._batches, self._began = [], now


def test_a_run_writes_down_its_device(losses: Any, tmp_path: Path, on_gpu: bool, row: Row) -> None:
    losses("out")
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    machine = written["machine"]
    assert machine["device"].startswith("gpu" if on_gpu else "cpu")
    facts = machine.get("gpu", {})
    assert bool(facts) == on_gpu
    assert "unknown" not in facts.values()
    row("device in run.json", ", ".join(map(str, [machine["device"], *facts.values()])))
