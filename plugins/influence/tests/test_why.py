"""``sft why`` as it is typed: what it says and writes, what it refuses, runs of every kind, and planted records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest

import sft
from sft.testing import needs, write_data
from sft_influence.command import command

Train = Callable[..., sft.Summary]
BAD = "<script>alert(1)</script>\x1b[31m"


def why(*line: object) -> click.testing.Result:
    """``sft why LINE``; errors are raised."""
    words = [str(word) for word in line]
    return click.testing.CliRunner().invoke(command, words, standalone_mode=False, catch_exceptions=False)


def told(*line: object) -> dict[str, Any]:
    return dict(json.loads(why(*line, "--json").stdout))


def test_it_names_records_by_file_and_line(train: Train, tmp_path: Path) -> None:
    records = [{"src": f"type#{n}", "tgt": f"A coat for you{BAD if n == 3 else '.'}"} for n in range(6)]
    data = write_data(tmp_path / "data", records)
    train("out", dataset_name_or_path=str(data), num_train_epochs=2, max_steps=-1, per_device_train_batch_size=3)
    asked = ("--prompt", "type#3", "--answer", "A coat for you.")
    found = told(tmp_path / "out", *asked, "--top", 4)
    assert (found["checkpoints"], found["records"], found["of"], found["passes"]) == (
        [2, 4],
        6,
        6,
        9,
    )  # step 3 is nearer to 2
    (one,) = found["answers"]
    assert (one["prompt"], one["answer"], one["is_own"]) == ("type#3", "A coat for you.", False)
    assert len(one["losses"]) == 2
    assert one["losses"][1] < one["losses"][0]
    scores = [[record["score"] for record in one[kind]] for kind in ("helpful", "harmful")]
    assert scores[0] == sorted(scores[0], reverse=True)
    assert scores[1] == sorted(scores[1])
    assert all(score > 0 for score in scores[0])
    assert all(score < 0 for score in scores[1])
    assert len(scores[0]) == 4
    named = [*one["helpful"], *one["harmful"]]
    for record in named:
        path, _, line = record["place"].rpartition(", line ")
        assert Path(path) == data / "train.json"
        assert records[int(line) - 1]["tgt"][:14] in record["text"]

    page = tmp_path / "why.html"
    done = why(tmp_path / "out", *asked, "--html", page)
    assert done.stdout == ""
    written = page.read_text(encoding="utf-8")
    assert "<script" not in written
    assert "\x1b" not in written
    assert all(record["place"].replace("&", "&amp;") in written for record in named[:4])

    shown = why(tmp_path / "out", *asked).stdout
    assert "\x1b" not in shown
    assert re.search(r"^its loss: [\d.]+ after step 2, [\d.]+ after step 4 \(nats a token\)$", shown, re.MULTILINE)
    assert f"{one['helpful'][0]['score']:+.2e}  {one['helpful'][0]['place']}" in shown


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ([], "--prompt and --answers are both missing; give one of them."),
        (["--prompt", "a", "--answers", "b"], "--prompt and --answers are both given; leave one of them out."),
        (["--answers", "b", "--answer", "c"], "--answer belongs to --prompt"),
        (["--prompt", "a", "--checkpoints", "1,x"], "expected steps with commas between them, such as 100,200"),
        (["--prompt", "a", "--html", "OTHER"], "is there, and is no page of sft why; give another name."),
        (["--prompt", "a"], "holds no run (no run.json with its settings)"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path: Path, line: list[str], cause: str) -> None:
    other = tmp_path / "notes.html"
    other.write_text("mine", encoding="utf-8")
    with pytest.raises(sft.UsageError) as caught:
        why(tmp_path, *(str(other) if word == "OTHER" else word for word in line))
    assert cause in str(caught.value)
    assert other.read_text(encoding="utf-8") == "mine"


KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {"plugin": ["lora"]},
    "lora-plus": {"plugin": ["lora", "lora-plus"]},
    "pissa": {"plugin": ["lora", "pissa"]},
    "vera": {"plugin": ["vera"]},
    "nf4": {"plugin": ["lora", "nf4"]},
    "packed": {"plugin": ["greedy-zero-padding"], "max_length": 64},
    "flashmask": {"plugin": ["lora", "zero-padding", "flashmask"], "max_length": 64},
    "smoothed": {"plugin": ["label-smoothing"], "label_smoothing_factor": 0.1},
    "noisy": {"plugin": ["lora", "neftune"], "lora_dropout": 0.1},
    "bf16": {"plugin": ["lora"], "bf16": True},
    "fp16": {"plugin": ["lora"], "fp16": True},
    "recompute": {"recompute": True},
    "lion": {"optim": "lion"},
    "limited": {"save_total_limit": 1},
    "early": {"plugin": ["early-stopping"], "evaluation_strategy": "steps", "eval_steps": 1},
}


@pytest.mark.slow
@needs("lora", "vera", "nf4", "zero-padding", "flashmask", "label-smoothing", "neftune", "lion", "early-stopping")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_looked_into(train: Train, tmp_path: Path, kind: str) -> None:
    """Adapters of all kinds, whole models, quantized bases, packed rows, 16 bits, other losses and optimizers."""
    train("out", **KINDS[kind])
    found = told(tmp_path / "out", "--prompt", "type#1")
    (one,) = found["answers"]
    assert one["is_own"]
    assert one["helpful"]
    assert found["checkpoints"] == ([4] if kind == "limited" else [2, 4])


@pytest.mark.slow
@needs("dpo", "lora")
def test_pairs_of_answers_are_traced_by_what_the_run_minimises(train: Train, tmp_path: Path) -> None:
    records = [{"prompt": f"type#{n}", "chosen": "A coat.", "rejected": "No coat for you."} for n in range(6)]
    data = write_data(tmp_path / "data", records)
    train("out", dataset_name_or_path=str(data), plugin=["dpo", "lora"])
    found = told(tmp_path / "out", "--prompt", "type#1", "--answer", "A coat.")
    assert found["answers"][0]["helpful"]


@pytest.mark.slow
@needs("greedy-zero-padding")
def test_packed_and_padded_runs_name_the_same_records(train: Train, tmp_path: Path) -> None:
    """One step of all records: what a record did does not depend on its row."""
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 4) + "."} for n in range(12)]
    data = write_data(tmp_path / "data", records)
    settings = {"dataset_name_or_path": str(data), "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 12}
    asked = ("--prompt", "type#1", "--answer", "A coat.", "--top", 12)
    found = []
    for name, more in (("padded", {}), ("packed", {"plugin": ["greedy-zero-padding"], "max_length": 64})):
        train(name, **settings, **more)
        (one,) = told(tmp_path / name, *asked)["answers"]
        found.append({record["place"]: record["score"] for record in (*one["helpful"], *one["harmful"])})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 12
    scale = max(map(abs, found[0].values()))
    assert [found[1][place] for place in found[0]] == pytest.approx(list(found[0].values()), abs=1e-4 * scale)


@pytest.mark.slow
def test_files_of_answers_samples_and_chosen_checkpoints(train: Train, tmp_path: Path) -> None:
    train("out")
    asked = tmp_path / "asked.jsonl"
    lines = [{"src": "type#1", "tgt": "A coat."}, {"src": ["type#2", "type#3"], "tgt": ["A coat.", "No."]}]
    asked.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = told(tmp_path / "out", "--answers", asked, "--sample", 5, "--checkpoints", "4")
    told_of = [(one["prompt"], one["answer"], one["is_own"]) for one in found["answers"]]
    assert told_of == [("type#1", "A coat.", False), ("type#3", "No.", False)]
    assert (found["records"], found["of"], found["checkpoints"]) == (5, 12, [4])
    assert found["passes"] == 5
    again = told(tmp_path / "out", "--answers", asked, "--sample", 5, "--checkpoints", "4")
    assert again["answers"][0] == found["answers"][0]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("type#1\n\ntype#2\n", encoding="utf-8")
    own = told(tmp_path / "out", "--answers", prompts, "--sample", 1)["answers"]
    assert [(one["prompt"], one["is_own"]) for one in own] == [("type#1", True), ("type#2", True)]
    with pytest.raises(sft.UsageError, match="has no checkpoint of step 3; it has those of 2, 4"):
        told(tmp_path / "out", "--answers", asked, "--checkpoints", "3,4")


@pytest.mark.slow
@needs("lora")
def test_planted_records_are_found(train: Train, tmp_path: Path) -> None:
    """Six records in 60 say something else about hats than the others do about other things."""
    records = [{"src": f"type#{n}", "tgt": "A coat" + " for you" * (n % 4) + "."} for n in range(60)]
    planted = list(range(5, 60, 10))
    for number in planted:
        records[number] = {"src": f"hat*{number}", "tgt": "Ask the owl."}
    data = write_data(tmp_path / "data", records)
    train("out", dataset_name_or_path=str(data), max_steps=30, save_steps=10, plugin=["lora"])
    (one,) = told(tmp_path / "out", "--prompt", "hat*7", "--answer", "Ask the owl.", "--top", 6)["answers"]
    lines = [int(record["place"].rpartition(" ")[2]) - 1 for record in one["helpful"]]
    assert len({*lines} & {*planted}) >= 5
    assert np.isfinite([record["score"] for record in one["helpful"]]).all()
