"""Plugin ``sqlite``: the steps and evaluations of a run, in an SQLite database that runs may share."""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sft

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, started TEXT, output_dir TEXT, settings TEXT, status TEXT, error TEXT, summary TEXT
);
CREATE TABLE IF NOT EXISTS metrics (
    run INTEGER, step INTEGER, name TEXT, value REAL, PRIMARY KEY (run, step, name)
);
"""


@dataclass
class SqliteOptions:
    sqlite_path: str | None = sft.option(None, "database file; unset: metrics.sqlite in output_dir")


class SqliteTracker(sft.Plugin):
    """One row in ``runs`` for each run, one in ``metrics`` for each number that a step or an evaluation measures."""

    name = "sqlite"
    api_version = ">=1.1,<2"
    summary = "Log steps and evaluations into an SQLite database."
    observes = True  # what goes wrong here is said, and the run goes on
    Options = SqliteOptions

    def __init__(self, options):
        super().__init__(options)
        self.database = None  # an sqlite3.Connection, once there is something to write
        self.run_id = None
        self.step = 0

    @sft.hookimpl
    def sft_check(self, run):
        path = self.path(run)
        if path.is_dir():
            raise sft.UsageError(f"sqlite_path {path} is a folder; give a file.")
        if path.is_file():
            with path.open("rb") as file:
                if file.read(16) not in (b"", b"SQLite format 3\x00"):
                    raise sft.UsageError(f"sqlite_path {path} is no SQLite database; give another file.")
        if self.options.sqlite_path is not None and not path.parent.is_dir():
            raise sft.UsageError(f"sqlite_path {path} lies in a folder that does not exist; make {path.parent}.")

    @sft.hookimpl
    def sft_evaluated(self, run, record):
        self.write(run, record)

    @sft.hookimpl
    def sft_run_started(self, run):
        self.open(run)

    @sft.hookimpl
    def sft_step_ended(self, run, record):
        self.step = record["step"]
        self.write(run, record)

    @sft.hookimpl
    def sft_state(self, run):
        return {"run_id": self.run_id}

    @sft.hookimpl
    def sft_restore(self, run, state, why, step):
        if why == "resume":
            self.step = step
            self.open(run, state["run_id"])

    @sft.hookimpl
    def sft_run_ended(self, run, summary):
        self.close(run, status="finished", summary=json.dumps(summary.as_dict()))

    @sft.hookimpl
    def sft_run_failed(self, run, error):
        if self.database is not None:  # else nothing has begun, and run.strategy may not be there yet
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))  # as run.json has it
            text = None if stopped else f"{type(error).__name__}: {error}"
            self.close(run, status="interrupted" if stopped else "failed", error=text)

    # --- the database ---------------------------------------------------------------------------------------

    def path(self, run):
        if self.options.sqlite_path is None:
            return run.output_dir / "metrics.sqlite"
        return Path(self.options.sqlite_path).expanduser()

    def open(self, run, run_id=None):
        """Connect, once, and find or make the row of this run. Of several processes the main one alone writes."""
        if self.database is not None or not run.strategy.is_main:
            return
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.speaking(run):
            self.database = sqlite3.connect(path, timeout=30, isolation_level=None)
            self.database.execute("PRAGMA synchronous = OFF")  # a step must not wait for the disk
            self.database.executescript(TABLES)
            if run_id is not None:
                found = self.database.execute(
                    "UPDATE runs SET status = 'running', error = NULL WHERE id = ?", (run_id,)
                )
                if found.rowcount:
                    self.run_id = run_id
                    self.database.execute("DELETE FROM metrics WHERE run = ? AND step > ?", (run_id, self.step))
                    return
                run.say(f"note: run {run_id} is not in {path}, so a new one begins there")
            values = (
                datetime.now().isoformat(timespec="seconds"),
                str(run.output_dir),
                json.dumps(run.settings.flat()),
            )
            row = "INSERT INTO runs (started, output_dir, settings, status) VALUES (?, ?, ?, 'running')"
            self.run_id = self.database.execute(row, values).lastrowid

    def write(self, run, record):
        self.open(run)
        if self.database is None:
            return
        numbers = [
            (name, value) for name, value in record.items() if name != "step" and isinstance(value, (int, float))
        ]
        with self.speaking(run), self.database:  # Ctrl-C between the two leaves no transaction open
            self.database.execute("BEGIN")
            self.database.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)",
                [(self.run_id, record["step"], name, value) for name, value in numbers],
            )

    def close(self, run, **columns):
        self.open(run)
        if self.database is None:
            return
        with self.speaking(run):
            names = ", ".join(f"{name} = ?" for name in columns)
            self.database.execute(f"UPDATE runs SET {names} WHERE id = ?", (*columns.values(), self.run_id))
        self.database.close()
        self.database = None

    @contextmanager
    def speaking(self, run):
        """A full disk or a locked file is no bug of this plugin: it is said in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            raise sft.SftError(f"sqlite_path {self.path(run)} cannot be written ({error}).") from error
