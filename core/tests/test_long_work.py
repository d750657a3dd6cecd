"""Long work is not silent: a bar in a terminal, lines elsewhere, and nothing of what is quick."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from terminals import Terminal

import sft
from sft import progress as module
from sft.progress import Progress
from sft.training.progress import Display
from sft.voice import Printer

Train = Callable[..., sft.Summary]


# --- lines --------------------------------------------------------------------------------------------------


def test_a_line_every_ten_seconds(clock: Callable[[float], None]) -> None:
    """One unit a second: 25 of 40 are 62.5 %, and 15 s are left."""
    said: list[str] = []
    for _ in Progress(said.append).over(range(40), "counting", "numbers"):
        clock(1)
    assert said[:2] == [
        "counting: 10 of 40 numbers, 1.0 a second, 25 %, 0:00:30 left",
        "counting: 20 of 40 numbers, 1.0 a second, 50 %, 0:00:20 left",
    ]
    assert len(said) == 3  # and none that says that all is done


def test_what_is_quick_says_nothing(clock: Callable[[float], None]) -> None:
    said: list[str] = []
    for _ in Progress(said.append).over(range(9), "counting", "numbers"):
        clock(1)
    assert said == []


def test_the_way_may_be_measured_in_something_else(clock: Callable[[float], None]) -> None:
    """Records are counted, and how far it is is known in bytes."""
    said: list[str] = []
    with Progress(said.append).task("reading", "records", 5000, of_units=False) as task:
        clock(20)
        task.advance(3000, done=1000)
    assert said == ["reading: 3,000 records, 150 a second, 20 %, 0:01:20 left"]


def test_without_a_total_only_the_count_is_said(clock: Callable[[float], None]) -> None:
    said: list[str] = []
    with Progress(said.append).task("reading", "records") as task:
        clock(10)
        task.advance(5)
    assert said == ["reading: 5 records, 0.5 a second"]


def test_a_slow_run_says_its_steps_though_logging_steps_does_not_ask(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.training.progress.LINE_EVERY", 0.0)
    said: list[str] = []
    train(say=said.append, max_steps=4, logging_steps=500, do_eval=False)
    steps = [line.split("  ")[0] for line in said if line.startswith("step ")]
    assert steps == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    monkeypatch.undo()
    train(say=said.append, max_steps=4, logging_steps=500, do_eval=False, overwrite_output_dir=True)
    assert [line.split("  ")[0] for line in said if line.startswith("step ")][4:] == ["step 1/4", "step 4/4"]


def test_all_that_is_long_in_a_run_shows_how_far_it_is(
    train: Train, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    said: list[str] = []
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_text(
        "\n".join([(dataset / "train.json").read_text()] * 20)
    )  # more than is read at once
    (folder / "dev.json").write_text((dataset / "dev.json").read_text())
    train(
        dataset_name_or_path=str(folder),
        say=said.append,
        max_steps=1,
        num_samples=3,
        eval_with_do_generation=True,
        max_new_tokens=4,
        per_device_eval_batch_size=2,
    )
    for what in ("reading train data", "reading weights", "measuring dev data", "answering"):
        assert any(line.startswith(f"{what}: ") for line in said), what
    assert any(line.startswith("writing weights: ") for line in said)


def test_a_plugin_that_silences_a_run_silences_its_progress(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """As parallel runs do in all processes but one."""

    class Silent(sft.Plugin):
        name = "silent"
        api_version = 1

        @sft.hookimpl
        def sft_check(self, run: sft.Run) -> None:
            run.say = lambda text: None

    for module_name in ("sft.progress", "sft.training.progress"):
        monkeypatch.setattr(f"{module_name}.LINE_EVERY", 0.0)
    said: list[str] = []
    train(plugins=(Silent,), say=said.append, max_steps=2, logging_steps=500)
    assert said == []


def seen_within(seconds: float, there: Callable[[], bool]) -> bool:
    """Whether ``there`` comes true, in real time."""
    ended = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if there():
            return True
        ended.wait(0.01)
    return there()


def test_work_that_does_not_advance_says_lines_by_time(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(Printer("stdout")) as progress, progress.task("measuring", "rows", 60):
        clock(9)
        assert not seen_within(0.1, lambda: bool(stream.getvalue()))
        clock(2)
        assert seen_within(5, lambda: stream.getvalue() == "measuring: 0 of 60 rows, 0:00:11 so far\n")
        clock(10)
        assert seen_within(5, lambda: stream.getvalue().endswith("\nmeasuring: 0 of 60 rows, 0:00:21 so far\n"))
    clock(100)
    assert not seen_within(0.1, lambda: stream.getvalue().count("\n") != 2)  # it has ended


def test_what_an_error_has_left_open_says_nothing_more(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(Printer("stdout")) as progress:
        items = progress.over(range(60), "counting", "numbers")
        next(items)
    clock(100)
    assert not seen_within(0.1, lambda: bool(stream.getvalue()))


def test_a_callable_of_the_user_is_called_by_no_other_thread(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    said: list[str] = []
    with Progress(said.append).task("counting", "numbers", 40):
        clock(100)
        assert not seen_within(0.1, lambda: bool(said))


def test_before_anything_is_done_a_total_of_something_else_is_not_said(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(Printer("stdout")) as progress, progress.task("reading", "records", 5000, of_units=False):
        clock(10)
        assert seen_within(5, lambda: stream.getvalue() == "reading: 0 records, 0:00:10 so far\n")


def test_answers_of_one_batch_show_their_tokens(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts, up to 4 tokens each, answered together: so much is known before the first answer is whole."""
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    said: list[str] = []
    train(say=said.append, max_steps=1, num_samples=3, max_new_tokens=4, per_device_eval_batch_size=8, do_eval=False)
    lines = [line for line in said if line.startswith("answering: ")]
    assert lines[0].startswith("answering: 3 tokens for 3 prompts, ")
    assert ", 25 %, " in lines[0]
    assert ", 75 %, " in lines[2]


def test_micro_batches_of_a_long_step_are_said(train: Train, clock: Callable[[float], None]) -> None:
    """Each takes 25 s: after 60 s a line says how far the step is."""

    class Slow(sft.Plugin):
        name = "slow"
        api_version = 1

        @sft.hookimpl
        def sft_micro_batch(self, run: sft.Run) -> None:
            clock(25)

    said: list[str] = []
    train(
        plugins=(Slow,),
        say=said.append,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=7,
        do_eval=False,
    )
    assert [line for line in said if "micro-batch" in line] == [
        "step 1/1: micro-batch 4 of 7, 0:01:15 so far",
        "step 1/1: micro-batch 7 of 7, 0:02:30 so far",
    ]


def test_one_long_micro_batch_is_said(clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(Printer("stdout")) as progress:
        display = Display(10, 3, progress)
        with display.within(4, 1):
            batch: Any = SimpleNamespace()
            display.sft_micro_batch(batch)
            clock(59)
            assert not seen_within(0.1, lambda: bool(stream.getvalue()))
            clock(2)
            assert seen_within(5, lambda: stream.getvalue() == "step 4/10: micro-batch 1 of 1, 0:01:01 so far\n")


# --- bars ---------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_that_goes_away(
    terminal: Callable[..., Terminal], clock: Callable[[float], None]
) -> None:
    screen = terminal()
    with Progress(Printer("stdout")) as progress, progress.task("counting", "numbers", 40) as task:
        clock(0.5)
        task.advance(10)
        assert screen.getvalue() == ""  # it would only flicker
        clock(1)
        task.advance(10)
        print("a line of its own")
    shown = screen.getvalue()
    assert "counting" in shown
    assert "\u2501" in shown
    assert "a line of its own\n" in shown
    assert shown.index("a line of its own") < shown.rindex("\x1b[2K")  # the bar is wiped, the line is not
    assert "\x1b[?25h" in shown  # and the cursor is back
    assert sys.stdout is screen


def test_a_bar_appears_though_nothing_advances(
    terminal: Callable[..., Terminal], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    screen = terminal()
    with Progress(Printer("stdout")) as progress, progress.task("measuring", "rows", 60):
        clock(0.9)
        assert not seen_within(0.1, lambda: bool(screen.getvalue()))
        clock(0.2)
        assert seen_within(5, lambda: "measuring" in screen.getvalue() and "0 of 60 rows" in screen.getvalue())
    assert "\x1b[?25h" in screen.getvalue()
    assert sys.stdout is screen


def test_the_bar_of_steps_moves_with_micro_batches(
    terminal: Callable[..., Terminal], clock: Callable[[float], None]
) -> None:
    screen = terminal()
    with Progress(Printer("stdout")) as progress:
        display = Display(10, 3, progress)
        with display.within(4, 8):
            batches: list[Any] = [SimpleNamespace() for _ in range(5)]
            # A stage of several parts is told of a micro-batch before each of them.
            for batch in (*batches, *batches[:3]):
                display.sft_micro_batch(batch)
                clock(1)
        display.close()
    assert "3/10, micro-batch 5/8" in screen.getvalue()


@pytest.mark.parametrize("bars", ["no terminal", "disable_tqdm", "say of one's own", "dumb terminal"])
def test_where_there_is_no_bar_there_are_lines(
    bars: str, terminal: Callable[..., Terminal], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callable that the user gave gets every line, and the terminal none."""
    screen = terminal()
    if bars == "no terminal":
        screen.isatty = lambda: False  # type: ignore[method-assign]
    if bars == "dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    said: list[str] = []
    say: Any = said.append if bars == "say of one's own" else Printer("stdout")
    for _ in Progress(say, bars != "disable_tqdm").over(range(20), "counting", "numbers"):
        clock(1)
    text = "\n".join(said) if bars == "say of one's own" else screen.getvalue()
    assert text.strip() == "counting: 10 of 20 numbers, 1.0 a second, 50 %, 0:00:10 left"


def test_an_error_leaves_the_terminal_as_it_was(
    terminal: Callable[..., Terminal], clock: Callable[[float], None]
) -> None:
    screen = terminal()

    def interrupted() -> None:
        with Progress(Printer("stdout")) as progress:
            for _ in progress.over(range(9), "counting", "numbers"):
                clock(2)
                if "counting" in screen.getvalue():
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in screen.getvalue()
    assert sys.stdout is screen


def test_results_in_a_file_stay_there_while_a_bar_is_on_standard_error(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(Printer("stderr")) as progress, progress.task("answering", "prompts", 9) as task:
        clock(2)
        task.advance()
        print("an answer")
    assert out.getvalue() == "an answer\n"
    assert "answering" in err.getvalue()


# --- dev data, said beforehand ------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "hint"), [({}, True), ({"do_eval": True}, False)])
def test_a_run_says_what_it_is_about_to_measure(train: Train, settings: dict[str, Any], hint: bool) -> None:
    said: list[str] = []
    summary = train(say=said.append, max_steps=1, **settings)
    tokens = summary.data["dev"]["tokens"]
    (plan,) = [text for text in said if text.startswith("plan:")]
    line = f"  dev data    7 records, {tokens:,} tokens, measured before and after training"
    assert (f"{line} (do_eval false leaves that out)" if hint else line) in plan.splitlines()
    assert said.index(plan) < said.index(next(text for text in said if text.startswith("dev data before training")))


def test_files_that_look_like_dev_data_are_named(train: Train, dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, source in (("train.json", "train.json"), ("validation.json", "dev.json"), ("test.json", "dev.json")):
        (folder / name).write_bytes((dataset / source).read_bytes())
    said: list[str] = []
    summary = train(say=said.append, max_steps=1, dataset_name_or_path=str(folder))
    assert summary.data["dev"]["records"] == 7
    (note,) = [line for line in said if line.startswith("note: ") and "not read" in line]
    assert note.startswith(f"note: test.json in {folder} is not read; dev data is what is called dev or validation")
