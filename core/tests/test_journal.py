"""The journal: what it counts does not depend on whether it writes, which one process of a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.testing import read_metrics
from sft.training.journal import Journal

VARY = ("seconds", "peak_memory_mib")


def steps(journal: Journal, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of some steps, each a line; their times and memory apart."""
    lines = []
    for step in range(first, last):
        journal.add(loss_sum=6.0 * step, tokens=10 + step, target_tokens=3, padding_tokens=step, rows=2, grad_norm=0.5)
        line = journal.step_line(step, step / 8, 1e-3)
        lines.append({key: value for key, value in line.items() if key not in VARY})
    return lines


def test_a_journal_without_a_file_counts_like_one_that_writes(tmp_path: Path) -> None:
    writing, counting = Journal(tmp_path / "metrics.jsonl"), Journal(None)
    assert steps(writing, 1, 4) == steps(counting, 1, 4) == read_metrics(tmp_path, same=True)
    for journal in (writing, counting):
        journal.write({"eval_loss": 1.0})
        journal.add(1.0, 2, 1, 0, 1, 0.5)
    assert counting.state() == writing.state()
    assert (counting.lines, counting.total.rows, counting.first_loss, counting.last_loss) == (4, 7, 2.0, 6.0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_both_go_back_to_the_same_state(tmp_path: Path) -> None:
    writing, counting = Journal(tmp_path / "metrics.jsonl"), Journal(None)
    steps(writing, 1, 3)
    state = writing.state()
    kept = read_metrics(tmp_path)
    steps(writing, 3, 6)
    steps(counting, 1, 6)
    for journal in (writing, counting):
        journal.rewind(state, tmp_path / "metrics.jsonl")
        assert journal.state() == state
    assert read_metrics(tmp_path) == kept
    assert steps(counting, 3, 4) == steps(writing, 3, 4)
