"""Which chat template is used, and that the result of a run carries it for every reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import Turn
from sft.data.tokenizer import Tokenizer

PAIRS = {"conversation": ["Q: {{user}}\nA: ", "{{bot}}<|im_end|>\n"], "query": "Q: {{query}}\nA: "}
JINJA = "{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}{% if add_generation_prompt %}[{% endif %}"
TALK = [Turn("user", "a"), Turn("assistant", "b", trains=True)]


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A model directory of which the tokenizer has a Jinja template in tokenizer_config.json."""
    copy = tmp_path / "model"
    shutil.copytree(models / "qwen2-untied", copy, ignore=shutil.ignore_patterns("*reference*"))
    return copy


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS), encoding="utf-8")
    return path


@pytest.fixture
def jinja(tmp_path: Path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text("\ufeff" + JINJA, encoding="utf-8")  # with a byte order mark, as some editors leave one
    return path


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))


# --- which one ----------------------------------------------------------------------------------------------


def test_a_file_takes_the_place_of_the_tokenizers_own(folder: Path, pairs: Path, jinja: Path) -> None:
    assert Tokenizer(folder).render(TALK) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert Tokenizer(folder, chat_template=str(jinja)).render(TALK) == "[a]<|im_end|>[b]<|im_end|>"
    assert Tokenizer(folder, chat_template=str(pairs)).render(TALK) == "Q: a\nA: b<|im_end|>\n"
    assert Tokenizer(folder, chat_template="none").render(TALK) == "ab<|im_end|>"
    assert Tokenizer(folder, chat_template="none").chat_template is None


def test_a_folder_stands_for_the_template_of_its_tokenizer(folder: Path, models: Path) -> None:
    other = Tokenizer(folder, chat_template=str(models / "llama3-scaled"))
    assert other.chat_template == Tokenizer(models / "llama3-scaled").chat_template
    assert other.eos_ids == Tokenizer(folder).eos_ids


def test_pairs_in_a_model_folder_are_used_where_there_is_no_jinja(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    assert Tokenizer(folder).render(TALK).startswith("<|im_start|>")
    assert Tokenizer(folder).template_name.endswith("tokenizer_config.json (chat_template.json beside it is not used)")
    values = config(folder)
    del values["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert Tokenizer(folder).render(TALK) == "Q: a\nA: b<|im_end|>\n"
    assert Tokenizer(folder).template_name.endswith("chat_template.json (PaddleNLP)")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "nowhere.jinja", r"nowhere\.jinja cannot be read \(No such file or directory\); give a file with"),
        (b"", "t.jinja", r"t\.jinja is empty; give a template, or none"),
        (b" \n", "t.jinja", r"t\.jinja is empty; give a template, or none"),
        (b"\xff\xfe", "t.jinja", r"t\.jinja is not UTF-8 text \("),
        (b"{", "t.json", r"t\.json is not valid JSON \("),
        (b"[" * 100_000, "t.json", r"t\.json is not valid JSON \("),
    ],
)
def test_files_that_are_no_template(
    folder: Path, tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(sft.UsageError, match=message):
        Tokenizer(folder, chat_template=str(tmp_path / name))


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold one JSON object")])
def test_a_folder_whose_settings_are_damaged_is_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(sft.UsageError, match=rf"tokenizer_config\.json {message}"):
        Tokenizer(folder, chat_template=str(tmp_path))


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["jinja", "pairs", "none"])
def test_the_saved_tokenizer_has_the_template_that_was_used(
    folder: Path, pairs: Path, jinja: Path, tmp_path: Path, given: str
) -> None:
    choice = {"jinja": str(jinja), "pairs": str(pairs), "none": "none"}[given]
    used, out = Tokenizer(folder, chat_template=choice), tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text("left from before")
    used.save(out)
    again = Tokenizer(out)
    assert again.chat_template == used.chat_template
    assert again.render(TALK) == used.render(TALK)
    # For transformers of any version and PaddleNLP, which read other files of these.
    assert (out / "chat_template.jinja").is_file() == (given == "jinja")
    assert (out / "chat_template.json").is_file() == (given == "pairs")
    assert config(out).pop("chat_template", None) == (JINJA if given == "jinja" else None)
    same = {key: value for key, value in config(folder).items() if key != "chat_template"}
    assert {key: value for key, value in config(out).items() if key != "chat_template"} == same


def test_a_template_that_is_the_tokenizers_own_changes_no_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Tokenizer(folder, chat_template=str(folder)).save(out)
    assert (out / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert not (out / "chat_template.jinja").exists()


# --- in a run -----------------------------------------------------------------------------------------------


def test_a_run_trains_with_the_template_and_its_result_answers_with_it(
    train: Callable[..., Any], pairs: Path, tmp_path: Path, models: Path
) -> None:
    said: list[str] = []
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "do_eval": False}
    train("out", say=said.append, chat_template=str(pairs), **settings)
    assert f"chat template: {pairs} (PaddleNLP)" in said
    for saved in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert Tokenizer(saved).render(TALK) == "Q: a\nA: b<|im_end|>\n"
    with pytest.raises(sft.UsageError, match="was trained on other tokens"):
        train("out", resume_from_checkpoint="auto", **{**settings, "max_steps": 3})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("none", "none; prompt and answer follow each other"),
        ("None", "none; prompt and answer follow each other"),
        (None, "MODEL/chat_template.jinja"),
        ("MODEL", "MODEL/chat_template.jinja"),
    ],
)
def test_a_run_says_which_template_it_uses(
    train: Callable[..., Any], models: Path, given: str | None, name: str
) -> None:
    said: list[str] = []
    model = str(models / "llama-tied-gqa")
    chosen = given and given.replace("MODEL", model)
    train(say=said.append, chat_template=chosen, max_steps=1, do_eval=False)
    assert [line for line in said if line.startswith("chat template")] == [
        f"chat template: {name.replace('MODEL', model)}"
    ]


def test_an_adapters_template_is_used_with_it(models: Path, pairs: Path, tmp_path: Path) -> None:
    from sft.inference.open import trained_template

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert trained_template(None) is None
    assert trained_template(adapter) is None  # one of PEFT's, without a tokenizer
    model = models / "llama-tied-gqa"
    Tokenizer(model, chat_template=str(pairs)).save(adapter)
    tokenizer = Tokenizer(model, chat_template=trained_template(adapter))
    assert tokenizer.render(TALK) == "Q: a\nA: b<|im_end|>\n"
    assert tokenizer.eos_ids == Tokenizer(model).eos_ids
