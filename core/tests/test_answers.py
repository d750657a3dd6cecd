"""Answers of a batch, answers as they grow, and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.conversations import Turn
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer
from sft.settings.arguments import GenerationArguments
from sft.testing import forward

CASES = ["llama-tied-gqa", "llama3-scaled", "qwen2-untied"]
PROMPTS = ["What is a river?", "coat", "type#dress*color#red", "Hi there, who are you"]


def load(models: Path, case: str) -> tuple[Any, Tokenizer]:
    from sft.models.loading import load_model, open_model

    return load_model(open_model(models / case)), Tokenizer(models / case)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    found = [encode_prompt([Turn("user", text)], tokenizer) for text in PROMPTS]
    assert len({len(ids) for ids in found}) == len(found)  # so that all but one are padded
    return found


@pytest.mark.parametrize("settings", [{}, {"top_k": 0, "temperature": 1.5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("case", CASES)
def test_prompts_of_a_batch_have_the_answers_that_they_have_alone(
    paddle: Any, models: Path, case: str, settings: dict[str, Any]
) -> None:
    from sft.models.generation import answers

    model, tokenizer = load(models, case)
    ids, generation = prompts(tokenizer), GenerationArguments(max_new_tokens=12, **settings)
    alone = [answers(model, tokenizer, [prompt], generation, 5)[0] for prompt in ids]
    assert answers(model, tokenizer, ids, generation, 5) == alone
    assert answers(model, tokenizer, ids[::-1], generation, 5) == alone[::-1]
    assert len(set(alone)) == len(alone)


def tokens_of(model: Any, tokenizer: Tokenizer, ids: list[list[int]], generation: Any, seed: int) -> list[list[int]]:
    from sft.models.generation import _decode

    found: list[list[int]] = [[] for _ in ids]
    for step in _decode(model, tokenizer, ids, generation, seed):
        for row, token in step.items():
            found[row].append(token)
    return found


def test_rows_of_a_batch_end_on_their_own(paddle: Any, models: Path) -> None:
    """The third token of the first answer is made an end; another answer that has it later goes on until there."""
    import copy

    model, tokenizer = load(models, "llama-tied-gqa")
    ids, generation = prompts(tokenizer), GenerationArguments(max_new_tokens=12)
    with paddle.no_grad():
        free = tokens_of(model, tokenizer, ids, generation, 0)
        ending = copy.copy(tokenizer)
        end = free[0][2]
        ending.stop_ids = [*tokenizer.stop_ids, end]
        ended = tokens_of(model, ending, ids, generation, 0)
    assert ended == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert len(ended[0]) == 2 < max(len(tokens) for tokens in ended)


def test_a_prompt_that_stands_twice_is_drawn_once(paddle: Any, models: Path) -> None:
    """A draw depends on seed and prompt, and differs with either."""
    from sft.models.generation import answers

    model, tokenizer = load(models, "llama-tied-gqa")
    ids = prompts(tokenizer)
    generation = GenerationArguments(max_new_tokens=8, top_k=0, temperature=2.0)
    first = answers(model, tokenizer, [ids[0], ids[1], ids[0]], generation, 1)
    assert first[0] == first[2] != first[1]
    assert answers(model, tokenizer, ids[:1], generation, 2)[0] != first[0]


def test_probabilities_are_those_of_transformers() -> None:
    """Temperature, top_k and top_p in its order; float64."""
    from sft.models.generation import distribution

    stored = json.loads((Path(__file__).parent / "fixtures" / "warpers.json").read_text())
    for case in stored["cases"]:
        expected = case.pop("probabilities")
        for logits, row in zip(stored["logits"], expected, strict=True):
            found = distribution(np.asarray(logits), GenerationArguments(**case))
            np.testing.assert_allclose(found, row, atol=1e-12, rtol=0, err_msg=str(case))


@pytest.mark.slow
def test_draws_follow_the_probabilities(paddle: Any, models: Path) -> None:
    """First tokens of 400 seeds against the model's own distribution: chi-square over the 4 likeliest and the rest."""
    model, tokenizer = load(models, "llama-tied-gqa")
    (ids,) = prompts(tokenizer)[:1]
    logits = forward(model, np.asarray([ids]))[0, -1].astype(np.float64)
    probabilities = np.exp(logits / 2 - (logits / 2).max())
    probabilities /= probabilities.sum()
    likeliest = np.argsort(-probabilities)[:4]
    generation = GenerationArguments(max_new_tokens=1, top_k=0, temperature=2.0)
    drawn = [tokens_of(model, tokenizer, [ids], generation, seed)[0] for seed in range(400)]
    counts = np.array([drawn.count([int(token)]) for token in likeliest])
    share = probabilities[likeliest]
    expected = np.append(share, 1 - share.sum()) * 400
    assert expected.min() > 5
    chi_square = ((np.append(counts, 400 - counts.sum()) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # exceeded with probability 0.001 at 4 degrees of freedom


# --- text as it grows ---------------------------------------------------------------------------------------

TEXTS = ["Grüße, 世界! 🙂👩‍👩‍👧 ok", "  leading and trailing  ", "a\n\n b", "中文字符", "é"]


class Bytes:
    """A sentencepiece-like tokenizer that has nothing but bytes: each character above ASCII is several tokens."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders
        from tokenizers.models import BPE

        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self.backend = Backend(BPE(vocabulary, [], byte_fallback=True))
        self.backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return str(self.backend.decode(list(ids)))


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_answer(models: Path, kind: str, text: str) -> None:
    from sft.models.generation import Text

    tokenizer: Any = Tokenizer(models / "llama-tied-gqa") if kind == "byte-level" else Bytes()
    ids = tokenizer.encode(text)
    growing, pieces = Text(tokenizer), []
    for end in range(1, len(ids) + 1):
        pieces.append(growing.grown(ids[:end]))
    pieces.append(growing.grown(ids, complete=True))
    assert "".join(pieces) == text.strip() == growing.of(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    if len(text) > 5:
        assert sum(bool(piece) for piece in pieces) > 3


def test_half_a_character_at_the_end_is_shown_at_last(models: Path) -> None:
    from sft.models.generation import Text

    tokenizer = Tokenizer(models / "llama-tied-gqa")
    ids = tokenizer.encode("ok 世")[:-1]
    growing = Text(tokenizer)
    shown = "".join(growing.grown(ids[:end]) for end in range(1, len(ids) + 1))
    assert shown == "ok"
    assert shown + growing.grown(ids, complete=True) == growing.of(ids) != "ok"


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_is_the_answer(paddle: Any, models: Path, case: str) -> None:
    from sft.models.generation import answers

    model, tokenizer = load(models, case)
    generation = GenerationArguments(max_new_tokens=20, top_k=0, temperature=3.0)
    for seed in range(3):
        pieces: list[str] = []
        prompt = encode_prompt([Turn("user", "coat")], tokenizer)
        (text,) = answers(model, tokenizer, [prompt], generation, seed, pieces.append)
        assert "".join(pieces) == text
        assert len(pieces) > 1


def test_an_interrupted_answer_leaves_the_model_as_it_was(paddle: Any, models: Path) -> None:
    from sft.models.generation import answers

    model, tokenizer = load(models, "llama-tied-gqa")
    model.train()
    prompt = encode_prompt([Turn("user", "coat")], tokenizer)

    def stop(piece: str) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(model, tokenizer, [prompt], GenerationArguments(max_new_tokens=9), 0, stop)
    assert model.training
    assert paddle.is_grad_enabled()
