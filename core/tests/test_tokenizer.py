"""The tokenizer: ids and chat texts as transformers makes them, special tokens, and templates of every kind."""

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

FOLDERS = ("llama-tied-gqa", "llama3-scaled", "qwen2-untied")
Variant = Callable[..., Tokenizer]


def references(models: Path, folder: str, kind: str) -> list[dict[str, Any]]:
    """What transformers gave for the texts or chats of a model directory."""
    return list(json.loads((models / folder / f"{kind}_reference.json").read_text(encoding="utf-8")))


def turns(messages: list[dict[str, str]]) -> list[Turn]:
    return [Turn(message["role"], message["content"]) for message in messages]


@pytest.fixture
def variant(models: Path, tmp_path: Path) -> Variant:
    """A copy of a model directory's tokenizer files with some of them changed, read again.

    ``config`` updates tokenizer_config.json (None takes a key away), ``template`` replaces the chat template,
    ``files`` maps further file names to JSON values (None removes the file).
    """

    def make(folder: str, template: Any = ..., files: dict[str, Any] | None = None, **config: Any) -> Tokenizer:
        copy = tmp_path / folder
        shutil.copytree(models / folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "*reference*"))
        declared = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
        if template is not ...:
            (copy / "chat_template.jinja").unlink(missing_ok=True)
            config["chat_template"] = template
        declared.update(config)
        kept = {key: value for key, value in declared.items() if value is not None}
        (copy / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        for name, value in (files or {}).items():
            (copy / name).unlink(missing_ok=True)
            if value is not None:
                (copy / name).write_text(json.dumps(value), encoding="utf-8")
        return Tokenizer(copy)

    return make


# --- ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_ids_are_those_of_transformers(models: Path, folder: str) -> None:
    tokenizer = Tokenizer(models / folder)
    cases = references(models, folder, "tokenizer")
    assert len(cases) == 10
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        begins_with_bos = tokenizer.bos_id is not None and case["ids"][:1] == [tokenizer.bos_id]
        # transformers adds a BOS to a text that has one; two are never wanted here.
        expected = case["ids"] if begins_with_bos else case["ids_with_special"]
        assert tokenizer.with_bos(tokenizer.encode(case["text"])) == expected, case["text"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_decoding_gives_the_text_back(models: Path, folder: str) -> None:
    tokenizer = Tokenizer(models / folder)
    for case in references(models, folder, "tokenizer"):
        if folder == "qwen2-untied" and "e\u0301" in case["text"]:
            continue  # its tokenizer composes accents (NFC)
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_decoding_without_special_tokens(models: Path) -> None:
    tokenizer = Tokenizer(models / "llama-tied-gqa")
    ids = [318, 39, 72, 319]
    assert tokenizer.decode(ids) == "<|im_start|>Hi<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi"


@pytest.mark.parametrize("folder", FOLDERS)
def test_spans_are_the_characters_of_each_token(models: Path, folder: str) -> None:
    tokenizer = Tokenizer(models / folder)
    cases = references(models, folder, "tokenizer")
    found = tokenizer.encode_spans([case["text"] for case in cases])
    assert [ids for ids, _ in found] == [case["ids"] for case in cases]
    for case, (ids, span) in zip(cases, found, strict=True):
        spans = [span(place) for place in range(len(ids))]
        for edges in zip(*spans, strict=True):
            assert list(edges) == sorted(edges)
        if not case["text"].isascii():
            continue  # there a token can be a part of a character
        assert "".join(case["text"][start:end] for start, end in spans) == case["text"]
        assert [tokenizer.decode([token]) for token in ids] == [case["text"][start:end] for start, end in spans]


def test_tokens_of_one_character_all_span_it(models: Path) -> None:
    ((ids, span),) = Tokenizer(models / "llama-tied-gqa").encode_spans(["a😀b"])
    assert len(ids) > 3
    assert [span(place) for place in range(len(ids))] == [(0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3)]


def test_padding_and_truncation_that_the_file_asks_for_are_left_out(models: Path, variant: Variant) -> None:
    stored = json.loads((models / "llama-tied-gqa" / "tokenizer.json").read_text(encoding="utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 317,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    tokenizer = variant("llama-tied-gqa", files={"tokenizer.json": stored})
    case = references(models, "llama-tied-gqa", "tokenizer")[0]
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.encode_spans([case["text"]])[0][0] == case["ids"]


# --- special tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "bos", "adds_bos", "eos", "pad", "size"),
    [
        ("llama-tied-gqa", 317, False, [319], 317, 320),
        ("llama3-scaled", 315, True, [319, 316], 316, 320),
        ("qwen2-untied", None, False, [311], 309, 312),
    ],
)
def test_special_tokens(
    models: Path, folder: str, bos: int | None, adds_bos: bool, eos: list[int], pad: int, size: int
) -> None:
    tokenizer = Tokenizer(models / folder)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.pad_id) == (bos, adds_bos, pad)
    assert tokenizer.eos_ids == eos  # the tokenizer's own, then the others of generation_config.json
    assert tokenizer.encode(tokenizer.eos_token) == [eos[0]]
    assert tokenizer.vocab_size == size


def test_without_a_pad_token_rows_are_padded_with_eos(variant: Variant) -> None:
    assert variant("llama-tied-gqa", pad_token=None).pad_id == 319


def test_special_tokens_may_be_objects_or_stand_in_their_own_file(variant: Variant) -> None:
    tokenizer = variant(
        "llama-tied-gqa",
        eos_token={"content": "<|endoftext|>", "lstrip": False},
        pad_token=None,
        files={"special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_start|>"}}},
    )
    assert tokenizer.eos_ids == [317, 319]  # tokenizer_config.json wins; 319 is the model's
    assert tokenizer.pad_id == 318


def test_eos_of_the_model_serves_where_the_tokenizer_names_none(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", eos_token=None)
    assert tokenizer.eos_ids == [319]
    assert tokenizer.eos_token == "<|im_end|>"


def test_no_eos_anywhere(variant: Variant) -> None:
    with pytest.raises(sft.UsageError, match=r"llama-tied-gqa names no end-of-text token; set eos_token in its tok"):
        variant("llama-tied-gqa", eos_token=None, files={"config.json": None, "generation_config.json": None})


@pytest.mark.parametrize(
    ("ids", "of_an_adding_tokenizer", "of_another"),
    [
        ([5, 6], [315, 5, 6], [5, 6]),
        ([315, 5], [315, 5], [315, 5]),
        ([315, 315, 315, 5], [315, 5], [315, 5]),
        ([5, 315], [315, 5, 315], [5, 315]),
        ([315], [315], [315]),
        ([], [315], []),
    ],
)
def test_trap_one_bos(
    models: Path, variant: Variant, ids: list[int], of_an_adding_tokenizer: list[int], of_another: list[int]
) -> None:
    stored = json.loads((models / "llama3-scaled" / "tokenizer.json").read_text(encoding="utf-8"))
    stored["post_processor"] = stored["post_processor"]["processors"][0]
    assert Tokenizer(models / "llama3-scaled").with_bos(ids) == of_an_adding_tokenizer
    assert variant("llama3-scaled", files={"tokenizer.json": stored}).with_bos(ids) == of_another


# --- chat ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("suffix", ["", "_generation"])
def test_chats_are_rendered_as_by_transformers(models: Path, folder: str, suffix: str) -> None:
    tokenizer = Tokenizer(models / folder)
    cases = references(models, folder, "chat")
    assert [case["name"] for case in cases] == ["single", "multi", "system", "leading-newline"]
    for case in cases:
        text = tokenizer.render(turns(case["messages"]), add_generation_prompt=bool(suffix))
        assert text == case["text" + suffix]
        assert tokenizer.with_bos(tokenizer.encode(text)) == case["ids" + suffix]


def test_no_template(variant: Variant) -> None:
    assert variant("llama-tied-gqa", template=None).chat_template is None


def test_the_file_wins_over_the_config(variant: Variant) -> None:
    # llama-tied-gqa has its template in chat_template.jinja.
    assert "<|im_start|>" in str(variant("llama-tied-gqa", chat_template="other").chat_template)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ([{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "tool", "template": "T"}, {"name": "rag", "template": "R"}], "T"),
    ],
)
def test_named_templates(variant: Variant, named: list[dict[str, str]], text: str) -> None:
    assert variant("llama-tied-gqa", template=named).render([Turn("user", "a")]) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<|endoftext|><|im_end|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "你好 <a>"}]'),
        ("{{ messages[0].content | trim }}", "你好 <a>"),
        ("{% for m in messages * 3 %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{{ strftime_now('%%') }}", "%"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
    ],
)
def test_what_templates_use(variant: Variant, template: str, text: str) -> None:
    assert variant("llama-tied-gqa", template=template).render([Turn("user", "你好 <a>")]) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "cannot write a conversation of user, user: roles must"),
        ("{{ missing.part }}", "cannot write a conversation of user, user: 'missing' is undefined."),
        ("{{ ''.__class__.__mro__ }}", "cannot write a conversation of user, user: access to attribute '__class__'"),
        ("{% for %}", "is not valid Jinja ("),
    ],
)
def test_templates_that_fail(variant: Variant, template: str, message: str) -> None:
    tokenizer = variant("llama-tied-gqa", template=template)
    with pytest.raises(sft.UsageError) as caught:
        tokenizer.render([Turn("user", "a"), Turn("user", "b")])
    assert f"The chat template of {tokenizer.folder} {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_cannot_change_the_conversation(variant: Variant) -> None:
    tokenizer = variant("llama-tied-gqa", template="{{ messages.append(1) }}")
    with pytest.raises(sft.UsageError, match="cannot write a conversation of user"):
        tokenizer.render([Turn("user", "a")])


def test_answers_stop_where_the_template_ends_a_turn(models: Path, variant: Variant) -> None:
    assert Tokenizer(models / "llama3-scaled").stop_ids == [319, 316]
    nothing = {"config.json": None, "generation_config.json": None}
    tokenizer = variant("llama-tied-gqa", eos_token="<|endoftext|>", files=nothing)
    assert (tokenizer.eos_ids, tokenizer.stop_ids) == ([317], [317, 319])


# --- files --------------------------------------------------------------------------------------------------


def test_no_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(sft.UsageError, match=r"has no tokenizer\.json; write one with transformers: AutoTokenizer"):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(sft.UsageError, match=r"tokenizer\.json cannot be read by the tokenizers library \("):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_config(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "llama-tied-gqa" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(sft.UsageError, match=r"tokenizer_config\.json is not valid JSON \("):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_saving_copies_the_files_unchanged(models: Path, tmp_path: Path, folder: str) -> None:
    tokenizer = Tokenizer(models / folder)
    tokenizer.save(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(saved)
    assert saved == {name: (models / folder / name).read_bytes() for name in saved}
    again = Tokenizer(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    again.save(tmp_path)  # onto itself
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved
