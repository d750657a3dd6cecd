"""Places that a plugin opens (``sft_data_source``), and the splits of data sets that settings name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft

Train = Callable[..., sft.Summary]


def put(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = ({"src": f"type#{number}", "tgt": "A coat for you"} for number in numbers)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plugin_says_which_files_a_name_means(train: Train, tmp_path: Path, lazy: bool) -> None:
    files = {"train": [put(tmp_path / "x.json", 1, 2), put(tmp_path / "y.json", 3)], "dev": []}
    asked: list[tuple[str, str]] = []

    class Toy(sft.Plugin):
        name = "toy"
        api_version = 1

        @sft.hookimpl
        def sft_data_source(self, run: sft.Run, name: str, split: str) -> list[Path] | None:
            asked.append((name, split))
            return files[split] if name.startswith("toy://") else None

    own = put(tmp_path / "own.json", 4, 5, 6, 7)
    summary = train(
        plugins=(Toy,), dataset_name_or_path=f"toy://things:1,{own}:1", lazy=lazy, max_steps=1, do_eval=False
    )
    assert list(summary.data["train"]["sets"]) == ["things", "own"]
    assert {*asked} == {(name, split) for name in ("toy://things", str(own)) for split in ("train", "dev")}
    with pytest.raises(sft.UsageError, match="No active plugin opens toy://things; install one that knows toy://"):
        train("other", dataset_name_or_path="toy://things", max_steps=1)


def test_a_scheme_asks_for_its_plugin(train: Train, distribute: Any, tmp_path: Path) -> None:
    source = f"""
        import sft
        from pathlib import Path

        class Toy(sft.Plugin):
            name = "toy"
            api_version = 1

            @sft.hookimpl
            def sft_data_source(self, run, name, split):
                if name.startswith("toy://"):
                    return [Path({str(put(tmp_path / "x.json", 1, 2, 3))!r})] if split == "train" else []
    """
    distribute("toy-source", source, {"toy": "Toy"}, {"source.toy": "Toy"})
    assert train(dataset_name_or_path="toy://things", max_steps=1).data["train"]["records"] == 3


def test_splits_limits_and_formats(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    put(folder / "train.json", *range(8))
    put(folder / "small.json", *range(3))
    put(folder / "dev.json", 20, 21)
    put(folder / "exam.json", *range(30, 35))
    alone = put(tmp_path / "alone.json", *range(40, 44))

    def counts(**about: Any) -> tuple[int, int]:
        sets = [{"path": str(folder), **about}, {"path": str(alone), "split": "dev"}]
        found = train(f"out-{len(list(tmp_path.iterdir()))}", dataset_name_or_path=sets, max_steps=1).data
        return found["train"]["records"], found["dev"]["records"]

    assert counts() == (8, 6)
    assert counts(limit=5) == (5, 6)
    assert counts(split="small") == (3, 4)
    assert counts(split={"train": "small", "dev": "exam"}) == (3, 9)
    assert counts(format="src/tgt") == (8, 6)
    with pytest.raises(
        sft.UsageError, match=r"train\.json, line 1: the record is not Alpaca .*, the format that is set"
    ):
        counts(format="alpaca")
    with pytest.raises(
        sft.UsageError, match="dataset_name_or_path: nothing is no format; known are src/tgt, messages,"
    ):
        counts(format="nothing")
    with pytest.raises(sft.UsageError, match=r"set has no split big; it needs big\.json, big/"):
        counts(split="big")
