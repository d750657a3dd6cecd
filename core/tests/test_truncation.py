"""Records longer than max_length: what each truncation keeps, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft
from sft.conversations import Conversation, Turn
from sft.data.encoding import encode
from sft.data.raw_text import TEXT_ROLE
from sft.data.tokenizer import Tokenizer
from sft.data.truncation import pieces
from sft.inference.evaluate import evaluate_finished
from sft.testing import needs

LONG = Conversation([Turn("user", "type#coat*warm " * 6), Turn("assistant", "A coat for you" * 8, trains=True)])
SHORT = Conversation([Turn("user", "a"), Turn("assistant", "b", trains=True)])


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Tokenizer:
    return Tokenizer(models / "llama-tied-gqa")


def cut(tokenizer: Tokenizer, how: str | None, most: int, *found: Conversation) -> Any:
    return encode(found, tokenizer, 1024, most, truncation=how)


@pytest.mark.parametrize("most", [2, 3, 7, 50])
def test_split_loses_no_target(tokenizer: Tokenizer, most: int) -> None:
    """Each pair of a token and its label that the whole record has comes once, in order, but for rows without any."""
    whole = cut(tokenizer, None, 4096, LONG, SHORT)
    parts = cut(tokenizer, "split", most, LONG, SHORT)
    pairs = [
        [(int(a), int(b)) for n in range(len(data)) for a, b in zip(data[n].input_ids, data[n].labels, strict=True)]
        for data in (whole, parts)
    ]
    assert [pair for pair in pairs[1] if pair[1] >= 0] == [pair for pair in pairs[0] if pair[1] >= 0]
    assert parts.lengths.max() < most
    assert parts.counts.target_tokens == whole.counts.target_tokens
    rows = [-(-(len(whole[n].input_ids)) // (most - 1)) for n in range(2)]
    assert parts.counts.pieces_dropped + len(parts) == sum(rows)
    assert parts.counts.records_split == sum(number > 1 for number in rows)
    expected = [
        number
        for number in range(2)
        for kept in pieces(len(whole[number].input_ids) + 1, most, "split", 0)
        if (whole[number].labels[kept[:-1]] >= 0).any()
    ]
    assert parts.numbers(range(len(parts))) == expected


def test_left_right_and_drop(tokenizer: Tokenizer) -> None:
    whole = cut(tokenizer, None, 4096, LONG)
    ids, n = whole.ids.tolist(), len(whole.ids)
    kept = int(ids[0] == tokenizer.bos_id)
    left = cut(tokenizer, "left", 20, LONG, SHORT)
    assert left.ids[:20].tolist() == ids[:kept] + ids[n - 20 + kept :]
    right = cut(tokenizer, "right", n - 5, LONG, SHORT)
    assert right.ids[: n - 5].tolist() == ids[:-5]
    drop = cut(tokenizer, "drop", n - 1, LONG, SHORT)
    assert (len(drop), drop.counts.records, drop.counts.records_too_long, drop.counts.records_dropped) == (1, 2, 1, 0)
    assert drop.numbers([0]) == [1]
    assert [one.counts.records_truncated for one in (left, right, drop)] == [1, 1, 0]
    nothing = cut(tokenizer, "right", 5, LONG, SHORT)  # of the prompt alone nothing is learned
    assert nothing.counts.records_dropped >= 1
    assert len(cut(tokenizer, "drop", n, LONG)) == 1


@pytest.mark.parametrize("how", ["left", "right", "drop", "split"])
def test_what_fits_is_left_alone(tokenizer: Tokenizer, how: str) -> None:
    plain, other = cut(tokenizer, None, 4096, LONG, SHORT), cut(tokenizer, how, 4096, LONG, SHORT)
    assert (other.fingerprint(), other.counts) == (plain.fingerprint(), plain.counts)


def test_pieces_overlap_by_one() -> None:
    assert [part.tolist() for part in pieces(7, 3, "split", 1)] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert [part.tolist() for part in pieces(6, 3, "split", 1)] == [[0, 1, 2], [2, 3, 4], [4, 5]]
    assert [part.tolist() for part in pieces(7, 3, "left", 1)] == [[0, 5, 6]]


@pytest.mark.parametrize("how", ["left", pytest.param("split", marks=pytest.mark.slow)])
def test_a_finished_model_is_measured_as_in_its_run(
    train: Callable[..., Any], dataset: Path, tmp_path: Path, how: str
) -> None:
    heard: list[str] = []
    summary = train(max_length=20, truncation=how, max_steps=2)
    assert summary.data["dev"]["records_truncated" if how == "left" else "records_split"] > 0
    given = {"model_name_or_path": str(tmp_path / "out"), "dataset_name_or_path": str(dataset)}
    found = evaluate_finished(given, None, heard.append)
    assert found["eval_loss"] == pytest.approx(summary.eval_loss_after, rel=1e-6)
    assert f"src_length 1024 and max_length 20 and truncation {how}, as in the run that wrote" in heard[0]


# --- raw text -----------------------------------------------------------------------------------------------


def test_of_a_text_every_token_is_learned(tokenizer: Tokenizer) -> None:
    text = "A coat for you. " * 9
    ids = tokenizer.with_bos(tokenizer.encode(text)) + [tokenizer.eos_ids[0]]
    document = Conversation([Turn(TEXT_ROLE, text, trains=True)])
    whole = cut(tokenizer, None, 4096, document)
    assert whole.ids.tolist() == ids
    assert whole[0].labels.tolist() == ids[1:]
    parts = cut(tokenizer, None, 10, document)
    assert np.concatenate([parts[n].labels for n in range(len(parts))]).tolist() == ids[1:]
    assert parts.lengths.tolist()[:-1] == [9] * (len(parts) - 1)
    assert (parts.counts.records, parts.counts.records_split, parts.counts.pieces_dropped) == (1, 1, 0)
    assert len(cut(tokenizer, "drop", 10, document)) == 0


@pytest.mark.parametrize("plugin", [[], pytest.param(["zero-padding"], marks=needs("zero-padding"))])
def test_a_run_on_texts(train: Callable[..., Any], tmp_path: Path, plugin: list[str]) -> None:
    texts = ["A coat for you. " * (1 + number % 5) for number in range(12)]
    (tmp_path / "train.json").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    heard: list[str] = []
    same = {"dataset_name_or_path": str(tmp_path / "train.json"), "max_length": 16, "num_train_epochs": 1}
    summary = train(plugin=plugin, say=heard.append, num_samples=1, **same)
    assert "note: no record asks anything, so num_samples answers nothing" in heard
    with pytest.raises(
        sft.UsageError, match="eval_with_do_generation answers questions of the dev data, which has none"
    ):
        train("asked", dev_split=1, eval_with_do_generation=True, **same)
    assert any("12 records of text (raw text)" in line and "records split" in line for line in heard)
    counts = summary.data["train"]
    assert counts["tokens"] == counts["target_tokens"] == summary.target_tokens
