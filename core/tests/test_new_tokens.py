"""Tokens that a model gets (`new_tokens`): in tokenizer and matrices, trained, saved, and where it is opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sft
from sft.data.tokenizer import NewToken, Tokenizer, tokens_beyond
from sft.inference.merge import merge
from sft.inference.open import load_for_inference
from sft.models.grown import Growth, rows_for
from sft.testing import forward, needs, write_data

MODELS = Path(__file__).parent / "fixtures" / "models"
NEW = ["<tool>", "<|extra|>", "colour"]


def quiet(text: str) -> None:
    pass


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    records = [{"src": f"say <tool> {n}", "tgt": f"<|extra|> colour {n % 3}"} for n in range(8)]
    return {
        **{"dataset_name_or_path": str(write_data(tmp_path / "data", records)), "do_eval": False, "max_steps": 3},
        **{"learning_rate": 1e-2, "disable_tqdm": True, "new_tokens": NEW},
    }


def logits(model: Any, tokenizer: Tokenizer) -> Any:
    return forward(model, np.array([tokenizer.encode("say <tool> and <|extra|> colour")]))


def test_new_tokens_are_whole_and_last_and_travel_with_the_tokenizer(tmp_path: Path) -> None:
    folder = MODELS / "llama-tied-gqa"
    plain, grown = Tokenizer(folder), Tokenizer(folder, new_tokens=[NewToken(text) for text in NEW])
    size = plain.vocab_size
    assert grown.new_ids == [size, size + 1, size + 2]
    assert grown.encode("a<tool>b") == [*plain.encode("a"), size, *plain.encode("b")]
    assert grown.decode(grown.encode("x <|extra|>"), skip_special_tokens=True).endswith("<|extra|>")
    assert grown.fingerprint() != plain.fingerprint()
    tmp_path.mkdir(exist_ok=True)
    grown.save(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = Tokenizer(tmp_path, new_tokens=[NewToken("<tool>")])
    assert again.new_ids == []
    assert again.encode("a <tool>colour") == grown.encode("a <tool>colour")


def test_many_new_tokens_take_no_longer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is looked up among the others: tokens are compared about once each, where a list of them would be gone
    through for each, 50 comparisons in the middle."""
    compared = 0
    same = NewToken.__eq__

    def counting(self: NewToken, other: object) -> bool:
        nonlocal compared
        compared += 1
        return same(self, other)

    monkeypatch.setattr(NewToken, "__eq__", counting)
    names = [f"<many-{number}>" for number in range(100)]
    grown = Tokenizer(MODELS / "llama-tied-gqa", new_tokens=[NewToken(name) for name in [*names, *names]])
    assert len(grown.new_ids) == 100
    assert compared < 500


def test_special_ones_are_those_of_transformers(tmp_path: Path) -> None:
    """As its own ``add_tokens`` has them, of the same tokenizer: ids, texts with and without them, and the file that
    the next one reads (fixtures/special_tokens.json, by make_special_tokens.py there)."""
    expected = json.loads((MODELS.parent / "special_tokens.json").read_text(encoding="utf-8"))
    new = [*(NewToken(text) for text in expected["ordinary"]), *(NewToken(text, True) for text in expected["special"])]
    grown = Tokenizer(MODELS / expected["model"], new_tokens=new)
    grown.save(tmp_path)
    (tmp_path / "config.json").write_text((MODELS / expected["model"] / "config.json").read_text())
    for tokenizer in (grown, Tokenizer(tmp_path)):
        for case in expected["cases"]:
            assert tokenizer.encode(case["text"]) == case["ids"]
            assert tokenizer.decode(case["ids"]) == case["whole"]
            assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["shown"]
    assert grown.new_ids == [
        grown.backend.token_to_id(text) for text in [*expected["ordinary"], expected["special"][0]]
    ]
    over = Tokenizer(MODELS / expected["model"], new_tokens=tokens_beyond(MODELS / expected["model"], tmp_path))
    assert over.encode(expected["cases"][0]["text"]) == expected["cases"][0]["ids"]
    assert over.decode(expected["cases"][0]["ids"], skip_special_tokens=True) == expected["cases"][0]["shown"]


@pytest.mark.parametrize(
    ("before", "tokens", "rows"), [(512, 515, 576), (512, 500, 512), (50257, 50260, 50260), (96, 97, 128), (12, 13, 16)]
)
def test_a_vocabulary_divides_as_it_did(before: int, tokens: int, rows: int) -> None:
    assert rows_for(before, tokens) == rows


def test_new_rows_begin_as_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    grown = Growth(6, 8, (4, 6)).of(values, 0)
    mean = values.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(grown[[4, 6, 7]], np.tile(mean, (3, 1)), rtol=1e-6)
    np.testing.assert_array_equal(grown[[0, 1, 2, 3, 5]], values[[0, 1, 2, 3, 5]])
    np.testing.assert_array_equal(Growth(6, 8, (4, 6)).of(values.T, 1), grown.T)


@pytest.mark.parametrize("model", ["llama-tied-gqa", pytest.param("qwen2-untied", marks=pytest.mark.slow)])
def test_a_whole_model_has_them(settings: Any, tmp_path: Path, model: str) -> None:
    """In its matrices, its config and its tokenizer; and resumed it is the run that was not stopped."""
    base, said = MODELS / model, []
    settings = {**settings, "model_name_or_path": str(base), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sft.run({**settings, "output_dir": str(tmp_path / "out")}, say=said.append)
    size = Tokenizer(base).vocab_size
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rows = rows_for(len(before), size + 3)
    assert any(line.startswith(f"new_tokens: 3 tokens, ids {size:,} to {size + 2:,}, ") for line in said)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {len(after[name]) for name in ("model.embed_tokens.weight", "lm_head.weight") if name in after} == {rows}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    opened, tokenizer = load_for_inference(str(tmp_path / "out"), None, quiet)
    assert tokenizer.encode("<tool>") == [size]
    assert logits(opened, tokenizer).shape[-1] == rows
    resumed = {**settings, "output_dir": str(tmp_path / "on")}
    sft.run({**resumed, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}, say=quiet)
    again = load_file(tmp_path / "on" / "model.safetensors")
    assert {name: value.tobytes() for name, value in again.items()} == {n: v.tobytes() for n, v in after.items()}


@needs("lora")
@pytest.mark.parametrize("model", ["llama-tied-gqa", pytest.param("qwen2-untied", marks=pytest.mark.slow)])
def test_an_adapter_has_them_and_brings_them_back(settings: Any, tmp_path: Path, model: str) -> None:
    """Over the base as it was: opened to the bit, merged but for float32 noise."""
    base, found = MODELS / model, []

    class Look(sft.Plugin):
        name = "look"
        api_version = 1

        @sft.hookimpl
        def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
            found.append(logits(run.model, run.tokenizer))

    settings = {**settings, "model_name_or_path": str(base), "output_dir": str(tmp_path / "out"), "plugin": "lora"}
    sft.run(settings, plugins=[Look], say=quiet)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    size = Tokenizer(base).vocab_size
    embedding = written["base_model.model.model.embed_tokens.weight"]
    assert not np.allclose(embedding[size], embedding[size + 1])  # they have learned
    opened, tokenizer = load_for_inference(str(base), tmp_path / "out", quiet)
    assert tokenizer.encode("<|extra|>") == [size + 1]
    np.testing.assert_array_equal(logits(opened, tokenizer), found[0])
    merge(str(base), tmp_path / "out", tmp_path / "merged", quiet)
    merged, tokenizer = load_for_inference(str(tmp_path / "merged"), None, quiet)
    np.testing.assert_allclose(logits(merged, tokenizer), found[0], atol=1e-4, rtol=0)


def test_a_run_has_special_ones_after_the_others(settings: Any, tmp_path: Path) -> None:
    """And its result shows answers without them."""
    base = MODELS / "llama-tied-gqa"
    settings = {**settings, "new_tokens": NEW[:1], "new_special_tokens": NEW[1:], "max_steps": 1}
    sft.run({**settings, "model_name_or_path": str(base), "output_dir": str(tmp_path / "out")}, say=quiet)
    tokenizer, size = Tokenizer(tmp_path / "out"), Tokenizer(base).vocab_size
    assert [tokenizer.encode(token) for token in NEW] == [[size], [size + 1], [size + 2]]
    assert tokenizer.decode([size, size + 1, size + 2], skip_special_tokens=True) == NEW[0]
    with pytest.raises(sft.UsageError, match=r"new_special_tokens: .<tool>. is among new_tokens too"):
        sft.run(
            {**settings, "new_special_tokens": NEW[:1], "model_name_or_path": str(base), "output_dir": "o"}, say=quiet
        )


def test_tokens_that_are_there_change_nothing(settings: Any, tmp_path: Path) -> None:
    said: list[str] = []
    settings = {**settings, "new_tokens": "a", "output_dir": str(tmp_path / "out"), "max_steps": 1}
    sft.run({**settings, "model_name_or_path": str(MODELS / "llama-tied-gqa")}, say=said.append)
    assert "new_tokens: the tokenizer has all of them already" in said
    shapes = [load_file(folder / "model.safetensors") for folder in (MODELS / "llama-tied-gqa", tmp_path / "out")]
    assert {n: t.shape for n, t in shapes[0].items()} == {n: t.shape for n, t in shapes[1].items()}


@pytest.mark.parametrize("tokens", [["<a>", " "], ["\ud800"]])
def test_what_is_no_token_is_refused(settings: Any, tmp_path: Path, tokens: list[str]) -> None:
    settings = {**settings, "new_tokens": tokens, "output_dir": str(tmp_path / "out")}
    with pytest.raises(sft.UsageError, match="new_tokens: expected texts, got"):
        sft.run({**settings, "model_name_or_path": str(MODELS / "llama-tied-gqa")}, say=quiet)


@needs("parallel-4d", "lora")
def test_a_plan_knows_what_trains(settings: Any) -> None:
    paper = pytest.importorskip("sft_parallel_4d.paper")
    values = {"model_name_or_path": str(MODELS / "qwen2-untied"), "plugin": ["lora"]}
    plain, grown = (paper.outline({**values, **more}).outline.count()[1] for more in ({}, {"new_tokens": ["<a>"]}))
    rows = load_file(MODELS / "qwen2-untied" / "model.safetensors")
    assert grown - plain == sum(rows[name].size for name in ("model.embed_tokens.weight", "lm_head.weight"))
