"""Bars: as much of them as the terminal has room for, and nothing that is not so."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from terminals import Terminal

from sft.bars import fit
from sft.progress import Progress
from sft.training.pace import Pace
from sft.training.progress import Display
from sft.voice import Printer

TEXTS = ["12/222", "loss 1.2345", "1,234 tokens/s", "lr 3.00e-04"]


@pytest.mark.parametrize(
    ("width", "bar", "behind"),
    [
        (199, 40, "12/222  loss 1.2345  1,234 tokens/s  lr 3.00e-04  0:01:00  ETA 0:12:30"),
        (79, 12, "12/222  loss 1.2345  1,234 tokens/s  lr 3.00e-04  ETA 0:12:30"),
        (39, 0, "12/222  loss 1.2345  ETA 0:12:30"),
        (33, 8, "12/222  ETA 0:12:30"),
        (24, 0, "12/222  ETA 0:12:30"),
        (15, 0, "12/222"),
    ],
)
def test_what_there_is_room_for(width: int, bar: int, behind: str) -> None:
    """The time that is left before all else, then the loss, a bar of eight columns, and the other figures; what room is
    left then makes the bar longer."""
    assert fit(width, "step", TEXTS, "0:01:00", "ETA 0:12:30") == ("step", bar, behind)


@pytest.mark.parametrize("what", ["step", "reading train (中文数据) data"])
def test_no_line_is_wider_than_the_terminal(what: str) -> None:
    """Chinese characters take two columns each. Figures go from the last one on."""
    for width in range(1, 130):
        before, bar, behind = fit(width, what, TEXTS, "0:01:00", "ETA 0:12:30")
        parts = behind.split("  ")
        assert cell_len(f"{before} {behind}") + bar + bool(bar) <= max(width, len(f" {TEXTS[0]}"))
        assert bar == 0 or bar >= 8
        assert parts[0] == TEXTS[0]
        assert [part for part in parts if part in TEXTS] == TEXTS[: sum(part in TEXTS for part in parts)]


def line_with(stream: Terminal, *texts: str) -> str:
    """The bar as it was drawn with ``texts`` in it, without the orders to the terminal; that is ten times a second."""
    for _ in range(100):
        lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
        found = [line for line in lines if all(text in line for text in texts)]
        if found:
            return found[-1]
        threading.Event().wait(0.05)
    raise AssertionError(stream.getvalue())


def record(step: int) -> dict[str, float]:
    return {"step": step, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3}


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bar_of_a_resumed_run_says_when_it_ends(
    terminal: Callable[..., Terminal], clock: Callable[[float], None], columns: int
) -> None:
    """From step 500 of 510 on: 30 s for the first step, then 2 s each, an evaluation of 10 s after each second step."""
    stream = terminal(columns)
    with Progress(Printer("stdout")) as progress:
        display = Display(510, 500, progress, lambda step: (510 // 2 - step // 2, 0))
        for step, seconds in ((501, 30), (502, 2), (503, 2)):
            clock(seconds)
            display.step(record(step), 1000.0)
            if step == 502:
                clock(10)
                display.evaluation(
                    {"step": step, "eval_loss": 1.0, "eval_ppl": 2.7, "eval_accuracy": 0.5, "eval_seconds": 10.0}
                )
        line = line_with(stream, "503/510", "ETA 0:00:54")
        display.close()
    # 7 steps of 2 s and 4 evaluations of 10 s
    assert cell_len(line) < columns
    assert ("tokens/s" in line) == (columns > 40)


def test_a_step_that_is_left_out_moves_the_bar(
    terminal: Callable[..., Terminal], clock: Callable[[float], None]
) -> None:
    stream = terminal()
    with Progress(Printer("stdout")) as progress:
        display = Display(4, 3, progress)
        clock(1)
        display.skipped(4, "step 4: skipped, for it is not finite")
        line = line_with(stream, "4/4")
        display.close()
    assert "step 4: skipped, for it is not finite\n" in stream.getvalue()
    assert "ETA" not in line


def test_what_takes_longer_than_was_expected_is_not_said_to_end_now(
    terminal: Callable[..., Terminal], clock: Callable[[float], None]
) -> None:
    stream = terminal()
    with Progress(Printer("stdout")) as progress:
        display = Display(10, 0, progress)
        for step in (1, 2, 3):
            clock(2)
            display.step(record(step), 1000.0)
        clock(100)
        assert line_with(stream, "3/10", "ETA -:--:--")
        display.close()


def test_no_color_takes_the_colours_away(terminal: Callable[..., Terminal], clock: Callable[[float], None]) -> None:
    """And nothing else: the bar, and what erases it, are there."""

    for environment, coloured in (({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)):
        stream = terminal(100, TERM="xterm-256color", **environment)
        with Progress(Printer("stdout")) as progress, progress.task("counting", "numbers", 40) as task:
            clock(2)
            task.advance(20)
            assert line_with(stream, "━", "20 of 40")
        assert bool(re.search(r"\x1b\[[\d;]*[39]\d[\d;]*m", stream.getvalue())) == coloured
        assert "\x1b[2K" in stream.getvalue()


# --- the pace of a run -------------------------------------------------------------------------------------


def test_the_first_step_counts_until_there_is_another(clock: Callable[[float], None]) -> None:
    pace = Pace(10, 0)
    assert pace.left is None
    clock(30)
    pace.step(1)
    assert pace.left == 30 * 9
    clock(3)
    pace.step(2)
    clock(1)
    pace.step(3)
    assert pace.seconds_a_step == 2
    assert pace.left == 2 * 7


def test_evaluations_and_checkpoints_that_come_count(clock: Callable[[float], None]) -> None:
    """The time of a pause is no part of a step. One evaluation was seen before the first step."""
    pace = Pace(12, 0, lambda step: (12 // 3 - step // 3, 12 // 4 - step // 4))
    pace.evaluated(8.0)
    for step in range(1, 5):
        clock(1)
        pace.step(step)
        if step == 3:
            clock(6)
            pace.evaluated()
        if step == 4:
            clock(5)
            pace.saved()
    assert pace.seconds_a_step == 1
    assert pace.left == 8 * 1 + 3 * 7 + 2 * 5


def test_only_recent_steps_say_how_long_one_takes(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.training.pace.RECENT", 4)
    pace = Pace(100, 0)
    for step in range(1, 21):
        clock(1 if step <= 10 else 5)
        pace.step(step)
    assert pace.left == 5 * 80


def test_how_long_a_run_takes_is_said_once(clock: Callable[[float], None]) -> None:
    """As soon as ten seconds and two steps beside the first have passed, if a minute is left."""
    said: list[str] = []
    for total in (100, 12):
        display = Display(total, 0, Progress(said.append))
        for step in range(1, 10):
            clock(4)
            display.step(record(step), 1000.0)
    (line,) = [text for text in said if text.startswith("time: ")]
    assert line.startswith("time: about 0:06:28 for 97 more steps (4 s each), until ")
