"""The journal: what it counts does not depend on whether it writes, which one process of a run does."""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sft.testing import read_metrics
from sft.training import journal as journal_module
from sft.training.journal import Journal

VARY = ("seconds", "peak_memory_mib")


def steps(journal: Journal, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of some steps, each a line; their times and memory apart."""
    lines = []
    for step in range(first, last):
        counts = {"tokens": 10 + step, "target_tokens": 4, "padding_tokens": step, "rows": 2}
        journal.add(loss_sum=6.0 * step, weight=3.0, **counts, grad_norm=0.5)
        line = journal.step_line(step, step / 8, 1e-3)
        journal.write(line)
        lines.append({key: value for key, value in line.items() if key not in VARY})
    return lines


def at(step: int, journal: dict[str, Any], evaluated: int | None = None) -> dict[str, Any]:
    """What a checkpoint says of the moment after ``step``."""
    return {"step": step, "journal": journal, "evaluation": {} if evaluated is None else {"step": evaluated}}


def test_a_journal_without_a_file_counts_like_one_that_writes(tmp_path: Path) -> None:
    writing, counting = Journal(tmp_path / "metrics.jsonl"), Journal(None)
    assert steps(writing, 1, 4) == steps(counting, 1, 4) == read_metrics(tmp_path, same=True)
    for journal in (writing, counting):
        journal.write({"eval_loss": 1.0})
        journal.add(1.0, 1.0, 2, 1, 0, 1, 0.5)
    assert {**counting.state(), "digest": ""} == {**writing.state(), "digest": ""}  # of what only one writes
    assert (counting.lines, counting.total.rows, counting.first_loss, counting.last_loss) == (4, 7, 2.0, 6.0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_checkpoint_from_before_there_were_weights() -> None:
    """Each target counted 1."""
    journal, old = Journal(None), Journal(None)
    journal.add(loss_sum=9.0, weight=3.0, tokens=5, target_tokens=3, padding_tokens=0, rows=1, grad_norm=0.5)
    state = journal.state()
    for sums in (state["window"], state["total"]):
        del sums["weight"]
    old.rewind(at(1, state), Path("nowhere"))
    assert old.state() == journal.state()
    assert old.step_line(1, 1.0, 1e-3)["loss"] == 3.0


def test_both_go_back_to_the_same_state(tmp_path: Path) -> None:
    writing, counting = Journal(tmp_path / "metrics.jsonl"), Journal(None)
    steps(writing, 1, 3)
    state = writing.state()
    kept = read_metrics(tmp_path)
    steps(writing, 3, 6)
    steps(counting, 1, 6)
    for journal in (writing, counting):
        assert journal.rewind(at(2, state), tmp_path / "metrics.jsonl") is None
        assert {**journal.state(), "digest": ""} == {**state, "digest": ""}
    assert writing.state() == state
    assert read_metrics(tmp_path) == kept
    assert steps(counting, 3, 4) == steps(writing, 3, 4)


@pytest.mark.parametrize("kept", ["nowhere", "by another name", "through a link"])
def test_what_is_unchanged_is_cut_off_and_not_written_anew(tmp_path: Path, kept: str) -> None:
    """The metrics of weeks are long. What somebody else keeps is not cut off."""
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    journal = Journal(path)
    steps(journal, 1, 3)
    state, before = journal.state(), path.read_bytes()
    steps(journal, 3, 6)
    if kept == "by another name":
        other.hardlink_to(path)
    if kept == "through a link":
        path.rename(other)
        path.symlink_to(other)
    whole, number = path.read_bytes(), path.stat().st_ino
    again = Journal(path)
    assert again.rewind(at(2, state), path) is None
    assert path.read_bytes() == before
    assert (path.stat().st_ino == number) == (kept == "nowhere")
    steps(again, 3, 6)
    assert [one.read_bytes() for one in tmp_path.glob("other")] == [whole] * (kept != "nowhere")
    assert (again.state()["digest"], path.is_symlink()) == (sha256(path.read_bytes()).hexdigest(), False)


def replaced(path: Path, number: int, text: bytes) -> None:
    """Put ``text`` in the place of a line."""
    lines = path.read_bytes().splitlines()
    lines[number] = text
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b'{"step": 2, "loss": 1.', [1, 3]),
        (b"\xff\xfe", [1, 3]),
        (b"[" * 100_000, [1, 3]),
        (b'{"step": "2"}', [1, 3]),
        (b'{"step": 2, "loss": 9.0}', [1, 2, 3]),
    ],
    ids=["cut off", "no text", "deep", "type", "another number"],
)
@pytest.mark.parametrize("digest", [True, False], ids=["", "earlier version"])
def test_lines_go_by_their_steps_and_a_changed_one_is_named(
    tmp_path: Path, text: bytes, left: list[int], digest: bool
) -> None:
    """A damaged line costs that step, and no later one comes twice."""
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    steps(journal, 1, 4)
    state = journal.state()
    steps(journal, 4, 5)
    replaced(path, 1, text)
    if not digest:
        del state["digest"]
    said = Journal(path).rewind(at(3, state), path)
    assert [line["step"] for line in read_metrics(tmp_path)] == left
    if digest or len(left) < 3:  # a number that is another one is noticed by the digest alone
        assert said is not None
        assert f"metrics.jsonl has been changed since step 3: {len(left)} lines up to there can be read, of 3" in said


LINES = [
    *(b'{"step": 1, "a": 2.5}', b'{"step": 1}, {"step": 2}', b'{"step": 1', b'"a": 1}', b"{}", b"", b"[1", b"2]", b"7"),
    *(
        b'{"a": "}',
        b'{b": "{"}',
        b'{"a": {"b": 1}}',
        b'{"a": [1, 2]}',
        b" {}",
        b"{} ",
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
    ),
    *(b"[" * 100_000, b'{"a": "\xc3\xbc"}', b"\xef\xbb\xbf{}", b"{\0}\0", b'{"a": 1, "a": 2}', b"},{", b"{]", b"[{}"),
]


@pytest.mark.parametrize("at_once", [2, 3, 200])
def test_many_lines_at_a_time_say_what_each_says(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Drawn by chance, so that lines which are wrong by themselves make something of each other."""
    monkeypatch.setattr(journal_module, "_AT_ONCE", at_once)
    draw = random.Random(at_once)
    for _ in range(300):
        lines = [draw.choice(LINES[: draw.choice([2, 6, len(LINES)])]) + b"\n" for _ in range(draw.randrange(7))]
        assert list(journal_module._values(lines)) == [journal_module._value(line) for line in lines]
    assert [journal_module._value(line) for line in LINES[:3]] == [{"step": 1, "a": 2.5}, None, None]


@pytest.mark.parametrize("evaluated", [True, False], ids=["before the checkpoint", "at the end"])
def test_an_evaluation_at_the_end_does_not_come_twice(tmp_path: Path, evaluated: bool) -> None:
    """What the end of a run measured after its last checkpoint goes, although it is of the same step."""
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    steps(journal, 1, 3)
    before = journal.state()
    journal.write({"step": 2, "eval_loss": 1.0})
    replaced(path, 0, b"?")
    Journal(path).rewind(at(2, journal.state(), 2) if evaluated else at(2, before, 1), path)
    assert [sorted(line)[0] for line in read_metrics(tmp_path)] == ["epoch", *(["eval_loss"] if evaluated else [])]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    steps(journal, 1, 3)
    said = Journal(tmp_path / "new.jsonl").rewind(at(2, journal.state()), tmp_path / "nowhere.jsonl")
    assert said is not None
    assert said.endswith("nowhere.jsonl is not there, so the lines up to step 2 are lost")
    assert (tmp_path / "new.jsonl").read_bytes() == b""
