"""Data sets of the hub's layout, opened offline from a folder that the test makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import sft
from sft_data_hub import opening

RECORDS = [{"messages": [{"role": "user", "content": f"type#{n}"}, {"role": "assistant", "content": "A coat."}]}
           for n in range(12)]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As data sets on the hub are: shards of parquet in data/, one split to train on, one to test, one for dev."""
    found = tmp_path / "owner" / "chats"
    (found / "data").mkdir(parents=True)
    for split, start, stop in (("train", 0, 4), ("train", 4, 8), ("validation", 8, 10), ("test", 10, 12)):
        shard = "00001" if start == 4 else "00000"
        of = "00002" if split == "train" else "00001"
        table = pyarrow.Table.from_pylist(RECORDS[start:stop])
        pyarrow.parquet.write_table(table, found / "data" / f"{split}-{shard}-of-{of}.parquet")
    return found


def test_a_run_trains_on_it(train: Callable[..., sft.Summary], folder: Path, tmp_path: Path) -> None:
    """As it does on the same records in a folder of sft's own; nothing asks for the plugin but the name."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for split, records in (("train", RECORDS[:8]), ("dev", RECORDS[8:10])):
        (plain / f"{split}.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    own = train("own", dataset_name_or_path=str(plain))
    for lazy in (False, True):
        heard: list[str] = []
        found = train(f"hub-{lazy}", say=heard.append, dataset_name_or_path=f"hf://{folder}", lazy=lazy)
        assert (found.train_loss_last, found.eval_loss_after) == (own.train_loss_last, own.eval_loss_after)
        assert any("writing its split train" in line for line in heard) is not lazy  # written once
    split = [{"path": f"hf://{folder}", "split": {"train": "test", "dev": "train"}}]
    other = train("other", dataset_name_or_path=split).data
    assert (other["train"]["records"], other["dev"]["records"]) == (2, 8)


def test_a_changed_folder_is_other_data(folder: Path) -> None:
    (before,) = opening.open_split(opening.Named.of(f"hf://{folder}"), "test", lambda text: None)
    table = pyarrow.Table.from_pylist(RECORDS[:5])
    pyarrow.parquet.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    (after,) = opening.open_split(opening.Named.of(f"hf://{folder}"), "test", lambda text: None)
    assert [pyarrow.parquet.read_table(path).num_rows for path in (before, after)] == [2, 5]


def test_what_it_cannot_open(folder: Path, tmp_path: Path, train: Callable[..., Any]) -> None:
    def refusal(name: Any) -> str:
        with pytest.raises(sft.UsageError) as caught:
            train(dataset_name_or_path=name)
        return str(caught.value)

    assert "has no split big; it has train, validation, test" in refusal([{"path": f"hf://{folder}", "split": "big"}])
    assert "hf://owner/gone cannot be opened (" in refusal("hf://owner/gone")
    assert "there is no folder" in refusal(f"hf://{tmp_path}/gone")
    assert "a folder has no revision; leave @v1 out" in refusal(f"hf://{folder}@v1")
    assert "hf://a/b/c is no name of a data set; it is hf://owner/name" in refusal("hf://a/b/c")
    assert "No active plugin opens other://a; install one that knows other://" in refusal("other://a")


def test_a_revision_and_a_config_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def builder(*about: Any, **more: Any) -> Any:
        asked.append((*about, more))
        raise ValueError("enough")

    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    for name in ("hf://owner/name@v1.0#small", "hf://owner/name", "hf://squad#plain"):
        with pytest.raises(sft.UsageError, match=r"cannot be opened \(enough\)"):
            opening.open_split(opening.Named.of(name), "train", lambda text: None)
    assert asked == [
        ("owner/name", "small", {"revision": "v1.0"}),
        ("owner/name", None, {"revision": None}),
        ("squad", "plain", {"revision": None}),
    ]
