"""Answers: greedy is argmax step by step, sampling depends on the seed alone, and both end where they should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.conversations import Turn
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer
from sft.settings.arguments import GenerationArguments
from sft.testing import forward

CASES = ["llama-tied-gqa", "llama3-scaled", "qwen2-untied", "mistral-gqa", "gemma-tied"]
PROMPT = [Turn("user", "What is a river?")]


@pytest.fixture
def loaded(paddle: Any, models: Path, request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """The model and the tokenizer of a case, with the attention of training installed, as in a run."""
    from sft.models.attention import DefaultAttention
    from sft.models.loading import load_model, open_model

    folder = models / getattr(request, "param", "llama-tied-gqa")
    model = load_model(open_model(folder))
    model.attention = DefaultAttention()
    return model, Tokenizer(folder)


def next_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Logits after ``ids``, from a full forward without a cache."""
    return forward(model, np.asarray([ids]))[0, -1]


def greedy(model: Any, ids: list[int], steps: int, ends: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < steps:
        token = int(next_logits(model, [*ids, *found]).argmax())
        if token in ends:
            break
        found.append(token)
    return found


def answer(model: Any, tokenizer: Tokenizer, seed: int = 0, turns: list[Turn] = PROMPT, **settings: Any) -> str:
    from sft.models.generation import answers

    return answers(model, tokenizer, [encode_prompt(turns, tokenizer)], GenerationArguments(**settings), seed)[0]


@pytest.mark.parametrize("loaded", CASES, indirect=True)
def test_a_greedy_answer_is_argmax_step_by_step(loaded: tuple[Any, Tokenizer]) -> None:
    """With a key/value cache there, and without one here."""
    model, tokenizer = loaded
    for turns in (PROMPT, [Turn("user", "Hi"), Turn("assistant", "ok"), Turn("user", "coat")]):
        prompt = encode_prompt(turns, tokenizer)
        assert len(prompt) <= 64 - 12  # all of it is read
        tokens = greedy(model, prompt, 12, tokenizer.eos_ids)
        expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer(model, tokenizer, turns=turns, max_new_tokens=12) == expected
        assert expected


@pytest.mark.parametrize("loaded", CASES, indirect=True)
def test_an_answer_stops_before_the_token_that_ends_it(loaded: tuple[Any, Tokenizer]) -> None:
    """The fourth token of the free answer is made an end-of-text token, the second of two."""
    model, tokenizer = loaded
    prompt = encode_prompt(PROMPT, tokenizer)
    free = greedy(model, prompt, 12, tokenizer.eos_ids)
    ending = copy.copy(tokenizer)
    ending.eos_ids = [tokenizer.eos_ids[0], free[3]]
    tokens = greedy(model, prompt, 12, ending.eos_ids)
    assert len(tokens) <= 3 < len(free)
    expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert answer(model, ending, max_new_tokens=12) == expected
    assert answer(model, tokenizer, max_new_tokens=12) != expected


def test_max_new_tokens_is_the_longest_answer(loaded: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = loaded
    tokens = greedy(model, encode_prompt(PROMPT, tokenizer), 8, tokenizer.eos_ids)
    for number in (1, 2, 5):
        expected = tokenizer.decode(tokens[:number], skip_special_tokens=True).strip()
        assert answer(model, tokenizer, max_new_tokens=number) == expected


SAMPLING = {"top_k": 0, "temperature": 1.5, "max_new_tokens": 10}


def test_a_sampled_answer_depends_on_the_seed_alone(paddle: Any, loaded: tuple[Any, Tokenizer]) -> None:
    """Not on what was drawn before."""
    model, tokenizer = loaded
    first = [answer(model, tokenizer, seed, **SAMPLING) for seed in range(5)]
    paddle.seed(99)
    paddle.randn([7])
    again = [answer(model, tokenizer, seed, **SAMPLING) for seed in reversed(range(5))]
    assert again[::-1] == first
    assert len(set(first)) == 5


def test_greedy_answers_do_not_depend_on_the_seed(loaded: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = loaded
    assert len({answer(model, tokenizer, seed, max_new_tokens=6) for seed in range(3)}) == 1


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_k": 0, "top_p": 0.4}, {"top_k": 5, "top_p": 0.6, "temperature": 2.0}],
    ids=["top-k", "top-p", "both"],
)
def test_draws_come_from_the_likeliest_tokens(loaded: tuple[Any, Tokenizer], settings: dict[str, Any]) -> None:
    """The set of first tokens over 60 seeds is within the one that the full forward's probabilities allow."""
    model, tokenizer = loaded
    logits = next_logits(model, encode_prompt(PROMPT, tokenizer)).astype(np.float64) / settings.get("temperature", 1.0)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-logits)
    before = np.cumsum(probabilities[order]) - probabilities[order]  # of the likelier tokens together
    kept = order[before < settings.get("top_p", 1.0)][: settings["top_k"] or None]
    allowed = {tokenizer.decode([int(token)], skip_special_tokens=True).strip() for token in kept}
    assert len(kept) < 50  # of 320
    found = {answer(model, tokenizer, seed, max_new_tokens=1, **settings) for seed in range(60)}
    assert found <= allowed
    assert len(found) > 1


def test_a_low_temperature_is_greedy(loaded: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = loaded
    expected = answer(model, tokenizer, max_new_tokens=6)
    assert answer(model, tokenizer, seed=3, top_k=0, temperature=1e-3, max_new_tokens=6) == expected


def test_an_answer_that_does_not_fit_is_refused(loaded: tuple[Any, Tokenizer]) -> None:
    """64 positions hold prompt and answer together; nothing is cut off in silence."""
    model, tokenizer = loaded
    turns = [Turn("user", "one two")]
    room = 64 - len(encode_prompt(turns, tokenizer))
    assert answer(model, tokenizer, turns=turns, max_new_tokens=room) is not None
    with pytest.raises(sft.UsageError, match=rf"max_new_tokens {room + 1} do not fit into the model's 64 positions"):
        answer(model, tokenizer, turns=turns, max_new_tokens=room + 1)


def test_the_models_mode_is_restored(loaded: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = loaded
    for mode in (model.train, model.eval):
        mode()
        training = model.training
        answer(model, tokenizer, max_new_tokens=2)
        assert model.training == training


def test_logits_that_are_a_part_of_something_larger(paddle: Any) -> None:
    """As an lm_head of more rows than there are tokens gives them, where paddle makes views of parts."""
    from sft.models.generation import _likeliest

    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    try:
        part = paddle.to_tensor([[1.0, 3.0, 9.0], [4.0, 2.0, 9.0]])[:, :2]
        assert not part.is_contiguous()
        assert _likeliest(part).tolist() == [1, 0]
    finally:
        paddle.set_flags(before)
