"""What a run writes down as it goes: ``metrics.jsonl``, one line a logged step or evaluation (``steps_file.py`` has the
figures of every step)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sft.files import is_own_file, replaced, sync
from sft.runtime import peak_memory_mib
from sft.training.steps_file import NAME as STEPS
from sft.training.steps_file import StepsFile

_VARY = ("seconds", "eval_seconds", "peak_memory_mib")
"""Numbers of lines that differ between runs that are equal."""
_AT_ONCE = 200
"""Lines that are read at a time; the objects of more would not stay in the processor's caches."""


def read_metrics(folder: Path, same: bool = False) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; ``same``: without what differs between equal runs (times, memory)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not (same and key in _VARY)} for line in lines]


@dataclass
class Totals:
    """Sums over the steps since the line before."""

    loss: float = 0.0
    weight: float = 0.0
    """Of the targets, as the loss has them."""
    tokens: int = 0
    target_tokens: int = 0
    padding_tokens: int = 0
    rows: int = 0
    grad_norm: float = 0.0
    """Of the last step."""
    values: dict[str, float] = field(default_factory=dict)
    """Of what the objective has a name for."""


@dataclass
class Journal:
    """Appends to ``metrics.jsonl``, and has what appends to ``steps.bin``. Its state travels in checkpoints, so a
    resumed run writes the same lines.

    Without a ``path`` it only counts: another process of the run writes.
    """

    path: Path | None
    window: Totals = field(default_factory=Totals)
    total: Totals = field(default_factory=Totals)
    first_loss: float | None = None
    last_loss: float | None = None
    lines: int = 0
    """Lines in the file."""
    steps: StepsFile = field(init=False)
    """The figures of each step, whether a line is due or not."""
    due: bool = False
    """Whether the next step that is taken writes a line; a logging step may overflow and be none."""
    skipped_steps: int = 0
    """Steps that overflowed in float16, or were not finite, and changed nothing."""
    skipped_in_a_row: int = 0
    """Of those that were not finite, the ones since the last step that was taken."""
    _since: float = field(default_factory=time.monotonic)
    _digest: Any = field(default_factory=hashlib.sha256)
    """Of the file, by which a resumed run sees that a line has changed."""

    def __post_init__(self) -> None:
        self.steps = StepsFile(None if self.path is None else self.path.with_name(STEPS))

    def add(
        self,
        loss_sum: float,
        weight: float,
        tokens: int,
        target_tokens: int,
        padding_tokens: int,
        rows: int,
        grad_norm: float,
        values: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Count one step; ``loss_sum`` and ``values`` are sums over its targets, which weigh ``weight`` together."""
        for sums in (self.window, self.total):
            sums.loss += loss_sum
            sums.weight += weight
            sums.tokens += tokens
            sums.target_tokens += target_tokens
            sums.padding_tokens += padding_tokens
            sums.rows += rows
            sums.grad_norm = grad_norm
            for name, value in values.items():
                sums.values[name] = sums.values.get(name, 0.0) + value

    def step_line(self, step: int, epoch: float, learning_rate: float) -> dict[str, Any]:
        """The line of a logged step, to be written; loss and the objective's values are weighted means over all
        targets since the line before."""
        now = time.monotonic()
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": self.window.loss / (self.window.weight or 1.0),
            "learning_rate": learning_rate,
            "grad_norm": self.window.grad_norm,
            "seconds": round(now - self._since, 3),
            "tokens": self.window.tokens,
            "target_tokens": self.window.target_tokens,
            "padding_tokens": self.window.padding_tokens,
            "peak_memory_mib": peak_memory_mib(),
            **{name: value / (self.window.weight or 1.0) for name, value in self.window.values.items()},
        }
        self._since, self.window, self.due = now, Totals(), False
        self.first_loss = line["loss"] if self.first_loss is None else self.first_loss
        self.last_loss = line["loss"]
        return line

    def write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            text = json.dumps(line, allow_nan=False) + "\n"
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(text)
            self._digest.update(text.encode())
        self.lines += 1

    def lost(self) -> None:
        """Begin those files anew that are not there any more."""
        if self.path is not None and not self.path.exists():
            self.lines, self._digest = 0, hashlib.sha256()
        self.steps.lost()

    def start(self) -> None:
        """The clock of the next line starts now."""
        self._since = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the next line."""
        self._since += seconds

    def state(self) -> dict[str, Any]:
        return {
            "window": asdict(self.window),
            "total": asdict(self.total),
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "lines": self.lines,
            "digest": self._digest.hexdigest(),
            "due": self.due,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def rewind(self, state: dict[str, Any], written: Path) -> str | None:
        """Go back to a checkpoint: restore the sums from its ``state``, and keep the lines that ``written`` had by
        then. Where the file is not what it was, those of its steps that can be read are kept, and a clause says so;
        where it is, and this run's own, it is cut off and not written anew."""
        sums = state["journal"]
        self.window, self.total = _totals(sums["window"]), _totals(sums["total"])
        self.first_loss, self.last_loss = sums["first_loss"], sums["last_loss"]
        self.skipped_steps, self.lines = sums["skipped_steps"], sums["lines"]
        self.due, self.skipped_in_a_row = sums.get("due", False), sums.get("skipped_in_a_row", 0)
        if self.path is None:
            return None
        there = written.read_bytes().splitlines(keepends=True) if written.is_file() else []
        kept = there[: sums["lines"]]
        text = b"".join(kept)
        self._digest = hashlib.sha256(text)
        is_same = self._digest.hexdigest() == sums.get("digest")
        if not is_same:
            evaluated = state["evaluation"].get("step") == state["step"]
            lines = [line if line.endswith(b"\n") else line + b"\n" for line in there]
            found = zip(lines, _values(lines), strict=True)
            kept = [line for line, value in found if _was_written(value, state["step"], evaluated)]
            text = b"".join(kept)
            self._digest = hashlib.sha256(text)
        self.lines = len(kept)
        if is_same and is_own_file(self.path, written):
            os.truncate(self.path, len(text))
            sync(self.path)
        else:
            with replaced(self.path) as staging:
                staging.write_bytes(text)
        if is_same or ("digest" not in sums and len(kept) == sums["lines"]):
            return None
        if not written.is_file():
            return f"{written} is not there, so the lines up to step {state['step']} are lost"
        return (
            f"{written} has been changed since step {state['step']}: {len(kept):,} lines up to there can be read, of "
            f"{sums['lines']:,} that were written"
        )


def _totals(values: dict[str, Any]) -> Totals:
    """Those of a checkpoint; before there were weights, each target counted 1."""
    return Totals(**{"weight": float(values["target_tokens"]), **values})


def _values(lines: list[bytes]) -> Iterator[Any]:
    """What each line says; None where that is no JSON. Many are read at a time where that cannot mean anything else, in
    half the time of one by one: a week's file has hundreds of thousands."""
    for start in range(0, len(lines), _AT_ONCE):
        block = lines[start : start + _AT_ONCE]
        text, count = b",".join(block), len(block)
        # Each begins and ends with a brace, and has no other: so an object that ends there can only have begun there.
        are_flat = text.count(b"{") == text.count(b"}") == count and text.count(b"}\n,{") == count - 1
        found: Any = _value(b"[" + text + b"]") if are_flat and text[:1] == b"{" and text[-2:] == b"}\n" else None
        is_each = isinstance(found, list) and len(found) == count and all(isinstance(one, dict) for one in found)
        yield from found if is_each else map(_value, block)


def _value(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _was_written(line: Any, step: int, evaluated: bool) -> bool:
    """Whether it is a line of a step up to ``step``. After that one there may have been an evaluation that only its
    run's end made."""
    try:
        return bool(line["step"] < step or (line["step"] == step and (evaluated or "eval_loss" not in line)))
    except (KeyError, TypeError):
        return False
