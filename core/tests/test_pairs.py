"""PaddleNLP's chat_template.json: the tokens that PaddleNLP trains on, and the prompts that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import Turn
from sft.data.encoding import encode
from sft.data.questions import encode_prompt
from sft.data.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "templates"
CASES = json.loads((FIXTURES / "pairs_references.json").read_text(encoding="utf-8"))
Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The tokenizer of the fixtures with a chat_template.json: the name of one, or its values."""

    def tokenizer(template: str | dict[str, Any], kind: str = "bytes") -> Tokenizer:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copy(FIXTURES / "tokenizers" / f"{kind}.json", folder / "tokenizer.json")
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        if isinstance(template, str):
            shutil.copy(FIXTURES / f"{template}.json", folder / "chat_template.json")
        else:
            (folder / "chat_template.json").write_text(json.dumps(template), encoding="utf-8")
        return Tokenizer(folder)

    return tokenizer


def turns_of(case: dict[str, Any]) -> list[Turn]:
    turns = [Turn("system", case["system"])] if case["system"] else []
    for question, answer in case["pairs"]:
        turns += [Turn("user", question), Turn("assistant", answer, trains=True)]
    return turns


def name(case: dict[str, Any]) -> str:
    return f"{case['template']}-{case['tokenizer']}-{len(case['pairs'])}{'-system' if case['system'] else ''}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_training_tokens_are_those_of_paddlenlp(make: Make, case: dict[str, Any]) -> None:
    tokenizer = make(case["template"], case["tokenizer"])
    encoded = encode([turns_of(case)], tokenizer, 10**6, 10**6)
    assert encoded.ids.tolist() == [token for part in case["parts"] for token in part]
    has_system = len(case["parts"]) % 2
    marks = [(number - has_system) % 2 == 1 and number >= has_system for number in range(len(case["parts"]))]
    assert encoded.trained.tolist() == [m for m, part in zip(marks, case["parts"], strict=True) for _ in part]
    ends = tokenizer.decode(case["parts"][-1]).rstrip().endswith(("</s>", "<|im_end|>"))
    assert encoded.counts.records_without_end == (0 if ends else 1)
    assert ends == (case["template"] != "pairs_bare")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_prompt_is_the_text_of_paddlenlp(make: Make, case: dict[str, Any]) -> None:
    tokenizer = make(case["template"], case["tokenizer"])
    prompt = [*turns_of(case), Turn("user", case["query"])]
    assert tokenizer.render(prompt, add_generation_prompt=True) == case["prompt"]
    if case["tokenizer"] == "bytes":  # Metaspace puts a space before each part
        assert tokenizer.decode(encode_prompt(prompt, tokenizer)) == case["prompt"]


@pytest.mark.parametrize("case", [c for c in CASES if c["template"] == "pairs_llama"], ids=name)
def test_a_prompt_is_what_training_shows_before_an_answer(make: Make, case: dict[str, Any]) -> None:
    tokenizer = make(case["template"], case["tokenizer"])
    turns = turns_of(case)
    prompt = encode_prompt(turns[:-1], tokenizer)
    assert prompt == [token for part in case["parts"][:-1] for token in part]


@pytest.mark.parametrize(("template", "number"), [("pairs_llama", 1), ("pairs_bare", 0)])
def test_a_tokenizer_that_adds_bos_leaves_the_template_alone(make: Make, template: str, number: int) -> None:
    tokenizer = make(template, "metaspace")
    assert tokenizer.adds_bos
    turns = [Turn("user", "a"), Turn("assistant", "b", trains=True)]
    encoded = encode([turns], tokenizer, 10**6, 10**6)
    assert encoded.ids.tolist().count(tokenizer.bos_id) == number
    assert encode_prompt(turns[:1], tokenizer).count(tokenizer.bos_id) == number


def test_an_answer_that_does_not_train_is_no_target(make: Make) -> None:
    tokenizer = make("pairs_llama")
    turns = [Turn("user", "a"), Turn("assistant", "no"), Turn("user", "b"), Turn("assistant", "yes", trains=True)]
    encoded = encode([[*turns, Turn("user", "c")]], tokenizer, 10**6, 10**6)
    assert tokenizer.decode(encoded.ids[encoded.trained]) == " yes</s>"
    assert tokenizer.decode(encoded.ids).endswith(" yes</s>")


def test_answers_stop_on_the_end_that_the_template_writes(make: Make) -> None:
    tokenizer = make("pairs_all")  # its last answers end with <|im_end|>, the tokenizer's end of text is </s>
    assert tokenizer.stop_ids == [tokenizer.encode(text)[0] for text in ("</s>", "<|im_end|>")]


PAIR = {"conversation": ["{{user}}", "{{bot}}</s>"]}


@pytest.mark.parametrize(
    ("values", "turns", "message"),
    [
        (PAIR, [Turn("system", "s"), Turn("user", "a")], "has no place for a system turn; put {{system}} into it."),
        (PAIR, [Turn("user", "a"), Turn("user", "b")], "writes pairs of a user's and an assistant's turn, and a conve"),
        (PAIR, [Turn("assistant", "a")], "writes pairs of a user's and an assistant's turn, and a conversation has as"),
        ({"conversation": ["{{user}", "{{bot}}"]}, [Turn("user", "a")], "cannot be used (unexpected '}')."),
        ({"conversation": ["{{raise_exception('no')}}", ""]}, [Turn("user", "a")], "cannot be used (no)."),
        ({"conversation": ["{{ user", ""]}, [Turn("system", "s"), Turn("user", "a")], "cannot be used (unexpected end"),
    ],
)
def test_conversations_it_cannot_write(make: Make, values: dict[str, Any], turns: list[Turn], message: str) -> None:
    tokenizer = make(values)
    with pytest.raises(sft.UsageError) as caught:
        encode([[*turns, Turn("assistant", "b", trains=True)]], tokenizer, 10**6, 10**6)
    assert f"Chat template {tokenizer.folder / 'chat_template.json'} {message}" in str(caught.value)


def test_a_prompt_ends_with_the_user(make: Make) -> None:
    with pytest.raises(sft.UsageError, match="writes a prompt that ends with the user's turn"):
        encode_prompt([Turn("user", "a"), Turn("assistant", "b")], make("pairs_llama"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conversation": ["a"]}, '"conversation" must be two texts'),
        ({"system": "s"}, '"conversation" must be two texts'),
        ({**PAIR, "system": 3}, '"system" must be text'),
        ({**PAIR, "lora": True}, "it has unknown keys (lora)"),
        ([], "it holds list, not an object"),
    ],
)
def test_files_of_another_form(make: Make, values: Any, message: str) -> None:
    with pytest.raises(sft.UsageError) as caught:
        make(values)
    assert message in str(caught.value)
    assert "PaddleNLP's form is" in str(caught.value)


def test_an_object_that_holds_jinja(make: Make) -> None:
    """So transformers' processors once kept theirs."""
    tokenizer = make({"chat_template": "{{ messages[0].content }}!"})
    assert tokenizer.render([Turn("user", "a")]) == "a!"
