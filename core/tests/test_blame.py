"""Which records made a step stand out (``sft blame``), and what the commands print of it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from replays import again, state_of

import sft
from sft.commands.blame import command as blame_command
from sft.commands.replay import command as replay_command
from sft.data.tokenizer import Tokenizer
from sft.data_report.records import Writer
from sft.replay.blame import Blame, Blamed, suspects
from sft.replay.page import BOUNDS, page_of_replay
from sft.replay.spikes import Spike
from sft.replay.value import Replay, ReplayedRecord, ReplayedStep, Span
from sft.replay.words import figures, of_blame
from sft.testing import write_data

Train = Callable[..., sft.Summary]
EVIL = "</pre><script>\x1b[2J"


def step_of(*records: tuple[float | None, float]) -> ReplayedStep:
    """A step of records with these losses and weights; they are called a, b and so on."""
    found = [
        ReplayedRecord("abcdefgh"[at], Span(at, 0, 9), 9, int(weight), weight, loss)
        for at, (loss, weight) in enumerate(records)
    ]
    return ReplayedStep(7, 0.5, 0.0, 1.0, None, [], found)


def spike(usual: float, loss_score: float, norm_score: float = 0.0) -> Spike:
    return Spike(7, 0.0, usual, loss_score, 1.0, 1.0, norm_score)


def test_what_is_blamed_adds_up_to_the_spike() -> None:
    """Σ w (l − u) over the records, by Σ w, is by how much the mean differs from what is usual."""
    step = step_of((9.0, 40.0), (2.1, 60.0), (1.5, 100.0), (None, 0.0), (3.0, 10.0))
    found = suspects(step, spike(2.0, 8.0), plain=True)
    assert [one.record.place for one in found] == ["a"]
    assert found[0].excess == 40 * 7
    assert found[0].share == 280 / (280 + 6 + 10)
    whole = (9 * 40 + 2.1 * 60 + 1.5 * 100 + 3 * 10) / 210 - 2
    assert abs((280 + 6 - 50 + 10) / 210 - whole) < 1e-12
    assert abs(step.mean_loss - 2 - whole) < 1e-12


@pytest.mark.parametrize(
    ("found", "plain", "names"),
    [
        (spike(2.0, -8.0), True, "b"),  # lower than usual: the one that is endless and easy
        (spike(2.0, 3.0, 9.0), True, "ba"),  # gradients: either way
        (spike(99.0, 8.0), False, "ba"),  # another objective has no usual cross-entropy
    ],
)
def test_the_direction_of_the_spike_counts(found: Spike, plain: bool, names: str) -> None:
    step = step_of((4.0, 50.0), (0.1, 100.0), (2.0, 30.0))
    assert [one.record.place for one in suspects(step, found, plain)] == list(names)


@pytest.mark.parametrize("plain", [True, False])
def test_a_record_whose_loss_is_not_finite_is_the_one(plain: bool) -> None:
    """Also where it is compared with the step's own mean, which then is no number."""
    step = step_of((4.0, 50.0), (float("nan"), 3.0), (2.0, 30.0))
    (found,) = suspects(step, spike(2.0, float("inf"), float("inf")), plain)
    assert (found.record.place, found.share) == ("b", 1.0)


def test_records_stand_by_their_loss() -> None:
    step = step_of((1.0, 9.0), (float("nan"), 9.0), (None, 0.0), (0.0, 9.0), (3.0, 9.0))
    assert "".join(one.place for one in step.by_loss) == "beadc"


def test_each_figure_that_differs_is_said() -> None:
    step = replace(step_of((4.0, 9.0)), recorded=(0.0, 1.5))
    found = Blame(9, [Blamed(spike(2.0, 8.0), step, [])], Replay("out", [step], 1, [0]))
    note = "  note: computed again, loss as recorded, to the last bit; grad norm recorded 1.5, differs by -0.5"
    assert note in list(of_blame(found))


def test_one_is_said_as_one() -> None:
    one, two = step_of((4.0, 9.0)), step_of((4.0, 9.0), (2.0, 9.0))
    assert dict(figures(one))["rows"].startswith("0 with 1 record: ")
    assert dict(figures(two))["rows"].startswith("0 with 2 records: ")
    for count, said in ((1, "1 of 9 steps stands out by"), (2, "2 of 9 steps stand out by")):
        found = Blame(9, [Blamed(spike(2.0, 8.0), one, [])] * count, Replay("out", [one], 1, [0]))
        assert any(line.startswith(said) for line in of_blame(found))


# --- pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Where is it, Zoë? — 你好 🙂 here", "�� broken � text 你", ""])
def test_texts_of_tokens_joined_are_the_text(base_model: Path, text: str) -> None:
    tokenizer = Tokenizer(base_model)
    ids = np.asarray([*tokenizer.backend.encode(text).ids, tokenizer.eos_ids[0]])
    each = Writer(tokenizer).each(ids)
    assert "".join(piece for piece, _ in each) == tokenizer.decode(ids)
    assert sum(count for _, count in each) == len(ids)
    assert each[-1][1] == 1


@pytest.mark.slow
def test_tokens_are_coloured_by_their_own_loss(train: Train, tmp_path: Path) -> None:
    """The loss of a token stands where the one before it is read."""
    records = [{"src": f"type#{n}", "tgt": f"A coat {EVIL} {n} 你好."} for n in range(4)]
    data = write_data(tmp_path / "data", records)
    train("out", dataset_name_or_path=str(data), max_steps=2, per_device_train_batch_size=2, max_length=60)
    found = again(tmp_path / "out", 2)
    page = page_of_replay(found)
    assert "<script" not in page
    assert "\x1b" not in page
    spans = re.findall(r'<span class="learned(?: s(\d))?" title="([^"]+)">([^<]*)</span>', page)
    record = max(found.steps[0].records, key=lambda one: one.loss or 0.0)
    row = found.steps[0].rows[record.span.row]
    losses = row.losses[row.labels != -100]
    told = [float(one) for _, title, _ in spans for one in title.split(", ")]
    np.testing.assert_allclose(told[: len(losses)], losses, atol=6e-4)
    shown = "".join(html.unescape(text) for _, _, text in spans)
    assert shown.count("A coat") == 2
    for shade, title, _ in spans:
        highest = max(float(one) for one in title.split(", "))
        assert abs(sum(highest >= bound for bound in BOUNDS) - int(shade or 0)) <= (
            min(abs(highest - b) for b in BOUNDS) < 1e-3
        )


# --- commands -----------------------------------------------------------------------------------------------


def typed(command: Any, *words: str) -> str:
    result = click.testing.CliRunner().invoke(command, words, standalone_mode=False, catch_exceptions=False)
    return result.stdout


@pytest.mark.slow
def test_a_bad_record_is_named(train: Train, tmp_path: Path) -> None:
    """One of 240, which a model that has learned the others does not expect."""
    records = [
        {"src": f"type#{'coat' if n % 2 else 'hat'}", "tgt": "A warm one for long cold days."} for n in range(240)
    ]
    records[170] = {"src": "type#coat", "tgt": "Zwölf Boxer jagen über den Deich."}
    data = write_data(tmp_path / "data", records)
    train(
        "out",
        dataset_name_or_path=str(data),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=60,
    )
    before = state_of(tmp_path / "out")
    found = json.loads(typed(blame_command, str(tmp_path / "out"), "--json", "--most", "3"))
    assert found["steps"] == 60
    assert found["spikes"][0]["records"][0]["place"] == f"{data / 'train.json'}, line 171"
    assert found["spikes"][0]["records"][0]["share"] > 0.9
    assert all(one["is_same"] for one in found["spikes"])
    said = typed(blame_command, str(tmp_path / "out"), "--most", "1")
    assert re.search(rf"step {found['spikes'][0]['step']}: loss .* usual .*\n +\d+%  loss .*line 171", said)
    words = [str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]
    done = click.testing.CliRunner().invoke(blame_command, words, standalone_mode=False, catch_exceptions=False)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"written to {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Zwölf Boxer jagen über den Deich." in re.sub(r"<[^>]+>", "", page)
    assert state_of(tmp_path / "out") == before


@pytest.mark.slow
def test_what_replay_prints(whole: Callable[..., Path], tmp_path: Path) -> None:
    said = typed(replay_command, str(whole()), "--step", "7", "--show", "2")
    assert said.count("as recorded, to the last bit") == 2
    assert re.search(r"rows +4 with 4 records: ", said)
    assert len(re.findall(r"train\.json, line \d+", said)) == 2
    assert "and 2 more (--show N)" in said
    assert "1 step computed, from checkpoint-6" in said
    found = json.loads(typed(replay_command, str(whole()), "--step", "7", "--json"))
    (step,) = found["steps"]
    for row in step["rows"]:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["ends"]) == len(row["losses"])
        assert [loss is None for loss in row["losses"]] == [label == -100 for label in row["labels"]]
    assert step["loss"] == step["recorded"]["loss"]


@pytest.mark.slow
def test_what_the_commands_refuse(whole: Callable[..., Path], tmp_path: Path) -> None:
    folder, own = str(whole()), tmp_path / "own.html"
    own.write_text("somebody's")
    for command, words, why in (
        (replay_command, (folder, "--step", "8", "--html", str(own)), "is no page of sft replay"),
        (replay_command, (folder, "--step", "8", "--show", "-1"), "show: expected"),
        (blame_command, (folder, "--most", "0"), "most: expected"),
    ):
        with pytest.raises(sft.UsageError, match=why):
            typed(command, *words)
    assert "no spike in 13 steps" in typed(blame_command, folder)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_cannot_be_blamed(whole: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(whole(), tmp_path / "out")
    (folder / "steps.bin").unlink()
    with pytest.raises(sft.UsageError, match=r"no steps\.bin .* sft replay --step N"):
        typed(blame_command, str(folder))
