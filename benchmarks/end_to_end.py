"""Whole runs: from the start of the program to the result on disk, on the work of ``benchmarks/steps.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import steps
from benchmarks.turns import Turns

if TYPE_CHECKING:
    from benchmarks.bench import Bench

TITLE = "Whole runs"
TEXT = """\
Target tokens a second from the start of the program to the result on disk: imports, encoding, packing, loading, one
pass over 24 records, and saving. Everything else is as in the training steps."""
RECORDS = 24


def cases() -> dict[str, str]:
    return steps.cases()


def measure(bench: Bench, case: str) -> dict[str, Any]:
    sides = steps.sides(bench, __name__, case, bench.records(RECORDS))
    return bench.compare(
        {name: lambda name=name, start=start: bench.restarted(name, start) for name, start in sides.items()},
        lambda turn: turn["targets"] / turn["seconds"],
        turns=3,
        warm=0,
        unit="target tokens/s",
        more_is_better=True,
        also=lambda found: {"seconds": round(sorted(turn["seconds"] for turn in found)[len(found) // 2], 1)},
    )


def sft_side(options: dict[str, Any]) -> None:
    turns = Turns()
    import sft

    summary = sft.run({**steps.sft_settings(options), "num_train_epochs": 1, "logging_steps": 500})
    assert summary is not None
    lines = Path(options["out"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    targets = sum(json.loads(line).get("target_tokens", 0) for line in lines)
    turns.ready("paddlepaddle", targets=targets)
    turns.begin()


def trl_side(options: dict[str, Any]) -> None:
    turns = Turns()
    trainer = steps.trl_trainer(options, num_train_epochs=1, logging_steps=500)
    targets = train(trainer)
    trainer.save_model(options["out"])
    turns.ready("torch", "transformers", "trl", "peft", targets=targets)
    turns.begin()


def paddlenlp_side(options: dict[str, Any]) -> None:
    turns = Turns()
    trainer = steps.paddlenlp_trainer(options, num_train_epochs=1, logging_steps=500)
    targets = train(trainer)
    trainer.model.save_pretrained(options["out"])
    turns.ready("paddlepaddle", "paddlenlp", targets=targets)
    turns.begin()


def train(trainer: Any) -> int:
    """Train; the target tokens of all steps."""
    found: list[int] = []
    step = trainer.training_step

    def counting(*given: Any, **named: Any) -> Any:
        loss = step(*given, **named)
        found.append(trainer.counted[1])
        return loss

    trainer.training_step = counting
    trainer.train()
    return sum(found)


SIDES = {"sft": sft_side, "trl": trl_side, "paddlenlp": paddlenlp_side}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))
