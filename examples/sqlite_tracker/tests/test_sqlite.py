"""What the README promises of the database."""

import json
import sqlite3

import pytest

import sft
from sft_sqlite import SqliteTracker


@pytest.fixture
def tracked(train, tmp_path):
    """Run with the tracker; a summary."""

    def run(name="out", plugins=(), **settings):
        path = str(tmp_path / "runs.sqlite")
        return train(name, (SqliteTracker, *plugins), **{"sqlite_path": path, "logging_steps": 1, **settings})

    return run


def rows(path, query, *values):
    with sqlite3.connect(path) as database:
        return database.execute(query, values).fetchall()


def test_every_number_of_metrics_jsonl_is_there(tracked, metrics, tmp_path):
    summary = tracked(evaluation_strategy="steps", eval_steps=1)
    expected = {
        (line["step"], name): value
        for line in metrics(tmp_path / "out")
        for name, value in line.items()
        if name not in ("step", "seconds", "eval_seconds", "peak_memory_mib")  # of the machine, not of the training
    }
    found = rows(tmp_path / "runs.sqlite", "SELECT step, name, value FROM metrics WHERE name NOT LIKE '%seconds'")
    assert {(step, name): value for step, name, value in found} == expected
    assert {step for step, name in expected if name == "eval_loss"} == {0, 1, 2, 3}
    ((status, stored, settings),) = rows(tmp_path / "runs.sqlite", "SELECT status, summary, settings FROM runs")
    assert status == "finished"
    assert json.loads(stored) == json.loads(json.dumps(summary.as_dict()))
    assert json.loads(settings)["learning_rate"] == 1e-2


def test_runs_share_a_file_and_change_nothing(tracked, train, metrics, tmp_path):
    tracked("one")
    tracked("two", seed=7)
    train("alone", logging_steps=1)
    assert rows(tmp_path / "runs.sqlite", "SELECT id, status FROM runs") == [(1, "finished"), (2, "finished")]
    assert metrics(tmp_path / "one", same=True) == metrics(tmp_path / "alone", same=True)


class Stops(sft.Plugin):
    name = "stops"
    api_version = 1

    @sft.hookimpl
    def sft_step_ended(self, record):
        if record["step"] == 3:
            raise sft.SftError("the power went off")


def test_a_resumed_run_goes_on_under_its_number(tracked, tmp_path):
    with pytest.raises(sft.SftError, match="the power went off"):
        tracked(plugins=(Stops,), max_steps=4, save_strategy="steps", save_steps=2)
    path = tmp_path / "runs.sqlite"
    assert rows(path, "SELECT id, status, error FROM runs") == [(1, "failed", "SftError: the power went off")]
    tracked(max_steps=4, save_strategy="steps", save_steps=2, resume_from_checkpoint="auto")
    tracked("whole", max_steps=4, save_strategy="steps", save_steps=2)
    assert rows(path, "SELECT id, status, error FROM runs") == [(1, "finished", None), (2, "finished", None)]
    losses = "SELECT step, value FROM metrics WHERE run = ? AND name = 'loss'"
    assert rows(path, losses, 1) == rows(path, losses, 2)


class Interrupts(sft.Plugin):
    name = "interrupts"
    api_version = 1

    @sft.hookimpl
    def sft_step_ended(self, record):
        if record["step"] == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_no_failure(tracked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tracked(plugins=(Interrupts,), max_steps=3)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "interrupted"
    assert rows(tmp_path / "runs.sqlite", "SELECT status, error FROM runs") == [("interrupted", None)]


def test_going_back_to_the_best_checkpoint_keeps_what_was_logged(tracked, tmp_path):
    said = []
    tracked(
        say=said.append,
        greater_is_better=True,  # so that the first checkpoint is the best
        max_steps=3,
        evaluation_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    assert [line for line in said if line.startswith("best model: checkpoint-1,")]
    assert rows(tmp_path / "runs.sqlite", "SELECT step FROM metrics WHERE name = 'loss'") == [(1,), (2,), (3,)]
    assert rows(tmp_path / "runs.sqlite", "SELECT count(*) FROM runs") == [(1,)]


def test_measuring_alone_is_a_run_too(tracked, tmp_path):
    tracked(sqlite_path=None, do_train=False)
    assert rows(tmp_path / "out" / "metrics.sqlite", "SELECT step FROM metrics WHERE name = 'eval_loss'") == [(0,)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("here", "is a folder"), ("text", "is no SQLite database"), ("none/runs.sqlite", "a folder that does not exist")],
)
def test_a_path_that_cannot_be_is_refused_before_the_run(tracked, tmp_path, name, message):
    (tmp_path / "here").mkdir()
    (tmp_path / "text").write_text("no database, but text")
    with pytest.raises(sft.UsageError, match=message):
        tracked(sqlite_path=str(tmp_path / name))
    assert not (tmp_path / "out").exists()
