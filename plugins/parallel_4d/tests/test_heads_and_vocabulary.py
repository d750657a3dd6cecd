"""Key/value heads that are fewer than tensor ranks, and vocabularies that do not divide among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resuming import checked
from trainings import PLANS, Trainings, assert_equal

from sft.testing import make_model, needs

pytestmark = pytest.mark.sweep  # as far as its tests are slow

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2051}
"""2051 tokens: of two ranks one has 1026, of four three have 513."""
LORA = {"plugin": ["lora"], "lora_rank": 4}
ADAPTED = {**LORA, "lora_target_modules": ["k_proj", "v_proj", "q_proj", "down_proj"]}
OUTER = {**LORA, "lora_target_modules": ["q_proj", "embed_tokens", "lm_head"]}
ROWS = {**LORA, "new_tokens": ["<tool>"], "trainable_token_indices": ["new", 5, 300]}
WHOLE = {**LORA, "lora_target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "k_proj"]}


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llamas by whether embedding and head are tied, and how many key/value heads they have."""
    found = {}
    for tied in (True, False):
        for heads in (1, 2):
            name = f"{'tied' if tied else 'untied'}-{heads}"
            folder = tmp_path_factory.mktemp("odd") / name
            found[name] = make_model(folder, tie_word_embeddings=tied, num_key_value_heads=heads, **SIZES)
    return found


def slow(*case: Any, plugins: tuple[str, ...] = ()) -> Any:
    return pytest.param(*case, marks=[pytest.mark.slow, needs(*plugins)])


@pytest.mark.parametrize(
    ("plan", "model", "settings"),
    [
        pytest.param("tp2", "untied-1", ADAPTED, marks=needs("lora")),
        slow("tp2", "tied-1", {}),
        slow("tp2-sequence", "untied-1", {}),
        slow("tp4", "untied-2", {}),
        slow("tp4", "tied-2", ADAPTED, plugins=("lora",)),
        slow("tp4-sequence", "tied-1", {}),
        slow("tp4-sequence", "untied-2", ADAPTED, plugins=("lora",)),
        slow("tp2-stage1", "untied-1", {}),
        slow("tp2-stage2", "tied-1", ADAPTED, plugins=("lora",)),
        slow("tp2-pp2", "tied-1", {}),
        slow("tp2-dp2", "untied-1", ADAPTED, plugins=("lora",)),
        slow("tp4", "untied-2", {"plugin": ["lora", "dora"]}, plugins=("lora", "dora")),
        slow("tp4", "tied-2", {"plugin": ["lora", "pissa"]}, plugins=("lora", "pissa")),
        slow("tp4", "untied-2", {"plugin": ["lora", "int8"]}, plugins=("lora", "int8")),
        slow("tp4", "untied-2", {"plugin": ["vera"]}, plugins=("vera",)),
        slow("tp4", "tied-2", OUTER, plugins=("lora",)),
        slow("tp4", "untied-2", OUTER, plugins=("lora",)),
        slow("tp4", "untied-2", ROWS, plugins=("lora",)),
        slow("tp2", "tied-1", ROWS, plugins=("lora",)),
        slow("tp4", "tied-2", WHOLE, plugins=("lora",)),
    ],
)
def test_they_learn_what_one_process_learns(
    trainings: Trainings, odd: dict[str, Path], plan: str, model: str, settings: dict[str, Any]
) -> None:
    values = {**settings, "model_name_or_path": str(odd[model])}
    output, results = trainings.many(PLANS[plan], **values)
    assert_equal(trainings.one(**values), output)
    copies: dict[str, set[str]] = {}
    for result in results:
        for name, digest in result.value["copies"].items():
            copies.setdefault(name, set()).add(digest)
    assert not [name for name, digests in copies.items() if len(digests) > 1], "copies of a part are not the same"


@pytest.mark.parametrize(
    ("old", "new", "settings"),
    [
        slow("tp4", "tp2", {}),
        slow("tp2", "one", {}),
        slow("one", "tp4-sequence", {}),
        slow("tp2-stage1", "dp2", ADAPTED, plugins=("lora",)),
        slow("dp2", "tp4", ADAPTED, plugins=("lora",)),
    ],
)
def test_they_go_on_under_another_plan(
    trainings: Trainings, odd: dict[str, Path], old: str, new: str, settings: dict[str, Any]
) -> None:
    checked(trainings, old, new, **settings, model_name_or_path=str(odd["untied-2"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradient", "weight"])
def test_damage_is_noticed(trainings: Trainings, odd: dict[str, Path], kind: str) -> None:
    values = {"model_name_or_path": str(odd["untied-2"]), "plugin": []}
    damaged, _ = trainings.many(PLANS["tp4"], damage=kind, **values)
    with pytest.raises(AssertionError, match="is apart from"):
        assert_equal(trainings.one(**values), damaged)


@pytest.mark.slow
def test_answers_are_those_of_one_process(trainings: Trainings, odd: dict[str, Path]) -> None:
    """Padding that won would be a token that nobody knows."""
    values = {"model_name_or_path": str(odd["untied-2"]), "num_samples": 2, "max_new_tokens": 8, "max_steps": 1}
    found = [trainings.many(PLANS[plan], **values)[1][0].value["samples"] for plan in ("one", "tp4")]
    assert found[0]
    assert found[0] == found[1]
