"""Modelfiles for Ollama: Go writes what the chat template writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sft
from sft.data.tokenizer import Tokenizer
from sft.inference.export import export

CASES = ("chatml", "llama3", "llama3-untrimmed", "default-system", "bos-in-text")


@pytest.fixture(scope="session")
def modelfiles(cases: ModuleType, script: Any) -> ModuleType:
    """make_modelfiles.py."""
    found: ModuleType = script("make_modelfiles")
    return found


@pytest.mark.parametrize("case", CASES)
def test_go_writes_what_the_chat_template_writes(
    modelfiles: ModuleType, fixtures: Path, tmp_path: Path, case: str
) -> None:
    expected = json.loads((fixtures / "modelfiles.json").read_text(encoding="utf-8"))[case]
    text = modelfiles.write(case, tmp_path).read_text(encoding="utf-8")
    assert text == expected["modelfile"], "make_modelfiles.py must be run again"
    _, template = modelfiles.CASES[case]
    given = None if template is None else str(modelfiles.TINY / "templates" / template)
    tokenizer = Tokenizer(tmp_path / "model", chat_template=given)
    for messages, written in zip(modelfiles.CONVERSATIONS, expected["written"], strict=True):
        turns = [sft.Turn(role, content) for role, content in messages]
        ids = tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True))
        assert tokenizer.with_bos(tokenizer.encode(written)) == tokenizer.with_bos(ids)
        assert not tokenizer.adds_bos or not written.startswith(tokenizer.special["bos_token"])


def test_the_rest_of_a_modelfile(cases: ModuleType, tmp_path: Path) -> None:
    folder = cases.prepare("qwen2", tmp_path / "model")
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(drawn))
    options = {"gguf_system": "Be kind.", "gguf_type": "f16"}
    _, path = export(str(folder), None, "ollama", tmp_path / "out", lambda text: None, options=options)
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first == "FROM ./model.gguf"
    assert lines[lines.index('SYSTEM """Be kind."""') :] == [
        'SYSTEM """Be kind."""',
        'PARAMETER stop "<|im_end|>"',
        *("PARAMETER temperature 0.7", "PARAMETER top_k 20", "PARAMETER top_p 0.8", "PARAMETER repeat_penalty 1.05"),
    ]
    with pytest.raises(sft.UsageError, match="gguf_system does nothing with --to gguf"):
        export(str(folder), None, "gguf", tmp_path / "other", lambda text: None, options=options)
    options["gguf_system"] = 'Say """'
    with pytest.raises(sft.UsageError, match='gguf_system must not contain """'):
        export(str(folder), None, "ollama", tmp_path / "other", lambda text: None, options=options)


def test_a_model_that_draws_nothing_keeps_its_penalty(cases: ModuleType, tmp_path: Path) -> None:
    """transformers applies it to the likeliest token too; the others are for drawing alone."""
    folder = cases.prepare("qwen2", tmp_path / "model")
    greedy = {"do_sample": False, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    _, path = export(str(folder), None, "ollama", tmp_path / "out", lambda text: None)
    parameters = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("PARAMETER")]
    assert parameters[1:] == ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.05"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}{{ loop.index }}]{{ m.content }}{% endfor %}>",
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }};{% endfor %}",
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% raw %}{{ x }}{% endraw %}",
    ],
    ids=["counts", "changes", "dates", "go"],
)
def test_a_template_that_does_more_is_not_claimed(cases: ModuleType, tmp_path: Path, template: str) -> None:
    said: list[str] = []
    folder = cases.prepare("llama", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    _, path = export(str(folder), None, "ollama", tmp_path / "out", said.append)
    assert "TEMPLATE" not in path.read_text()
    assert "so the Modelfile has no TEMPLATE" in " ".join(said)
