"""What 16 bits cost in learning: the dev loss after 200 steps in bfloat16, beside that of the same run in float32."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import steps
from benchmarks.bench import LeftOutError
from benchmarks.turns import Restarted, Turns

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from benchmarks.turns import Side

TITLE = "Learning in 16 bits"
TEXT = """\
Loss a target token on 100 records that are not trained on, after 200 steps of one packed row of at most 512 tokens, the
same rows in the same order in both types. Beside it the loss after half of them. Random weights and made records teach
nothing about learning, so this is measured with a model and records that are given:

    make bench ARGS="precision --model DIR --data DIR"\
"""
STEPS, LENGTH, TRAINED, HELD_OUT = 200, 512, 1300, 100


def cases() -> dict[str, str]:
    return {kind: f"{words}, packed" for kind, words in steps.KINDS.items() if kind != "full"}


def measure(bench: Bench, case: str) -> dict[str, Any]:
    if bench.given_model is None or bench.given_data is None:
        raise LeftOutError("random weights learn nothing that counts: give --model and --data")
    data = split(bench.records(TRAINED + HELD_OUT), bench.new_folder("split"))

    def start(name: str, dtype: str) -> Side:
        places = {"model": str(bench.model), "data": str(data), "out": str(bench.new_folder("out"))}
        work = {"kind": case, "packed": True, "dtype": dtype, "steps": STEPS, "settings": bench.settings}
        return bench.side(__name__, "sft", **work, **places)

    sides = {"sft": "float32", "sft bfloat16": "bfloat16"}
    return bench.compare(
        {name: partial(Restarted, name, partial(start, name, dtype)) for name, dtype in sides.items()},
        lambda turn: turn["after"],
        turns=1,
        warm=0,
        unit="dev loss",
        more_is_better=False,
        also=lambda found: {f"after {STEPS // 2}": round(found[0]["halfway"], 4)},
    )


def split(records: Path, folder: Path) -> Path:
    """The last records as dev set, in a new folder."""
    lines = (records / "train.json").read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir()
    (folder / "train.json").write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    (folder / "dev.json").write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return folder


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import sft

    count = options["steps"]
    run = {**steps.sft_settings(options), "max_length": LENGTH, "max_steps": count, "logging_steps": count}
    sft.run({**run, "do_eval": True, "evaluation_strategy": "steps", "eval_steps": count // 2})
    lines = Path(options["out"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["eval_loss"] for line in map(json.loads, lines) if "eval_loss" in line]
    _, halfway, after = losses  # the first is that before training
    turns.ready("paddlepaddle", halfway=halfway, after=after)
    turns.begin()


SIDES = {"sft": sft_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
