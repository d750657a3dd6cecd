"""The decoder, family by family, beside what transformers computes (fixtures/families/make_families.py)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft.data.batches import assemble
from sft.seams import Batch, Example

FOLDER = Path(__file__).parent / "fixtures" / "families"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
RELATIVE = 2e-6
"""Of the largest logit; float32 against float64 is up to 1.1e-6 in transformers itself."""
SCALE = 0.5


def load(case: str) -> Any:
    from sft.models.loading import load_model, open_model

    return load_model(open_model(FOLDER / case))


def batch_of(*rows: list[np.ndarray]) -> Batch:
    """Rows of documents, in which every next token is a target."""
    return assemble([[Example(ids, np.append(ids[1:], -100)) for ids in row] for row in rows], pad_id=0)


def logits_of(model: Any, batch: Batch) -> np.ndarray:
    import paddle

    from sft.models.forward import hidden_states

    with paddle.no_grad():
        return np.asarray(model.lm_head(hidden_states(model, batch)).numpy())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(paddle: Any, case: str) -> None:
    found = load_file(FOLDER / case / "reference.safetensors")
    ids, expected = found["input_ids"], found["logits"].astype(np.float64)
    logits = logits_of(load(case), batch_of([ids[0]], [ids[1]]))
    assert np.abs(logits - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_a_document_reads_alike_alone_and_packed_between_others(paddle: Any, case: str) -> None:
    found = load_file(FOLDER / case / "reference.safetensors")
    ids, expected = found["input_ids"], found["logits"].astype(np.float64)
    packed = logits_of(load(case), batch_of([ids[0][:7], ids[0], ids[1]], [ids[1][:5]]))
    for row, start in ((0, 7), (1, 24)):
        difference = np.abs(packed[0, start : start + 17] - expected[row]).max()
        assert difference <= RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_transformers_alone_and_in_a_batch(paddle: Any, case: str) -> None:
    from sft.models.cache import CachedReading

    found = load_file(FOLDER / case / "reference.safetensors")
    model = load(case)

    def answer(prompts: list[np.ndarray]) -> np.ndarray:
        width = max(map(len, prompts))
        padding = np.asarray([width - len(prompt) for prompt in prompts])
        ids = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        reading, chosen = CachedReading(model.architecture, padding), []
        with paddle.no_grad():
            for _ in range(found["generated"].shape[1]):
                reading.expect(ids.shape[1])
                hidden = model.hidden_states(model.embed(paddle.to_tensor(ids)), reading)
                ids = model.lm_head(hidden[:, -1:])[:, 0].argmax(-1).numpy()[:, None]
                chosen.append(ids)
        return np.concatenate(chosen, axis=1)

    one, other = found["input_ids"]
    together = answer([one, other, other[:9]])
    np.testing.assert_array_equal(together[:2], found["generated"])
    np.testing.assert_array_equal(together[2:], answer([other[:9]]))


def test_an_answer_that_outgrows_longropes_first_length_is_read_again(paddle: Any) -> None:
    """Documents beyond 12 tokens have other frequencies, also for the tokens before."""
    from sft.models.generation import _decode
    from sft.settings.arguments import GenerationArguments

    model = load("phi3-longrope")
    limit = model.architecture.rotaries[0].limit
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 112, size) for size in (11, 10, 9, 8, 7, 6, 5, 11, 10, 9, 8, 7)]
    endless: Any = SimpleNamespace(pad_id=0, stop_ids=frozenset())
    settings = GenerationArguments(max_new_tokens=10, top_k=1)
    with paddle.no_grad():
        steps = list(_decode(model, endless, [prompt.tolist() for prompt in prompts], settings, seed=0))
    for row, document in enumerate(prompts):
        assert len(document) < limit < len(document) + len(steps)
        for step in steps:
            likeliest = logits_of(model, batch_of([document]))[0, len(document) - 1].argmax()
            assert step[row] == likeliest
            document = np.append(document, likeliest)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_one_lora_step_are_those_of_transformers(paddle: Any, case: str) -> None:
    """With W + s·A·B in W's place, dA = s·dW·Bᵀ and dB = s·Aᵀ·dW."""
    from sft.models.layers import target_layers
    from sft.training.loss import batch_loss

    found = load_file(FOLDER / case / "reference.safetensors")
    model = load(case)
    targets = {target.name: target.layer for target in target_layers(model)}
    pairs = {name: pair_of(name, found) for name in targets}
    for name, layer in targets.items():
        a, b = (pairs[name][part] for part in ("A", "B"))
        layer.weight.set_value(layer.weight.numpy() + np.float32(SCALE) * (a @ b))
    loss = batch_loss(model, batch_of(*([ids] for ids in found["input_ids"])))
    loss.backward()
    assert float(loss) == pytest.approx(float(found["loss"][0]), rel=RELATIVE)
    for name, layer in targets.items():
        if layer.weight.grad is None:  # an expert that no token chose
            assert not pairs[name]["B.grad"].any()
            continue
        gradient, pair = layer.weight.grad.numpy(), pairs[name]
        for part, value in (("A", SCALE * gradient @ pair["B"].T), ("B", SCALE * pair["A"].T @ gradient)):
            expected = pair[f"{part}.grad"]
            if expected is None:  # gate and up share A there: their summands add up
                beside = name.replace("gate_proj", "up_proj")
                if beside == name:
                    continue
                value = value + SCALE * targets[beside].weight.grad.numpy() @ pairs[beside]["B"].T
                expected = pair["A.grad of both"]
            assert np.abs(value - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-3), (name, part)


def pair_of(name: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's A, B and their gradients for a Linear; of an expert, its part of what stands stacked there."""
    parts = ("A", "B", "A.grad", "B.grad")
    if ".experts." not in name:
        return {part: found[f"{name}.{part}"] for part in parts}
    experts, _, rest = name.partition(".experts.")
    number, _, linear = rest.partition(".")
    stacked = "gate_up_proj" if linear in ("gate_proj", "up_proj") else linear
    whole = {part: found[f"{experts}.experts.{stacked}.{number}.{part}"] for part in parts}
    if stacked == linear:
        return whole
    half = whole["B"].shape[1] // 2
    mine = slice(0, half) if linear == "gate_proj" else slice(half, None)
    return {
        **whole,
        "B": whole["B"][:, mine],
        "B.grad": whole["B.grad"][:, mine],
        "A.grad": None,
        "A.grad of both": whole["A.grad"],
    }


def test_every_family_has_a_case() -> None:
    from sft.models.families.known import FAMILIES

    types = {json.loads((FOLDER / case / "config.json").read_text())["model_type"] for case in CASES}
    assert types == set(FAMILIES)


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_tokens_find_their_experts_by_one_sort(paddle: Any, case: str) -> None:
    """Values and gradients are those of each token alone through each of its experts, the router's among them; an
    expert that is chosen is called once, and no other is."""
    from sft.models.decoder import SparseMLP

    (layer,) = [one for one in load(case).sublayers() if isinstance(one, SparseMLP)][:1]
    calls: list[int] = []
    for number, expert in enumerate(layer.experts):
        expert.register_forward_pre_hook(lambda _, given, number=number: calls.append(number))
    hidden = layer.gate.weight.shape[0]
    inputs = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, hidden)).astype(np.float32))

    def one_by_one() -> Any:
        rows = []
        for token in inputs.reshape([-1, hidden]):
            shares = paddle.nn.functional.softmax(layer.gate(token))
            weights, chosen = paddle.topk(shares, layer.chosen)
            weights = weights / weights.sum() if layer.normalise else weights
            row = sum(weights[place] * layer.experts[number](token) for place, number in enumerate(chosen.tolist()))
            if hasattr(layer, "shared_expert"):
                row = row + paddle.nn.functional.sigmoid(layer.shared_expert_gate(token)) * layer.shared_expert(token)
            rows.append(row)
        return paddle.stack(rows).reshape(inputs.shape)

    found: list[dict[str, np.ndarray]] = []
    for compute in (one_by_one, lambda: layer(inputs)):
        calls.clear()
        out = compute()
        called = list(calls)
        (out**2).sum().backward()
        found.append({"out": out.numpy()})
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[-1][name] = parameter.grad.numpy()
            parameter.clear_gradient(set_to_zero=False)
    assert sorted(called) == sorted(set(called))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)
