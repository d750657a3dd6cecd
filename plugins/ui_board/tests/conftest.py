"""A board that answers, and folders of runs to show; the rest of what tests share is in plugins/conftest.py."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sft_ui_board.server import application, server_of

TOKEN = "a" * 64


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Client:
    """Asks the board at ``port``: with its token, under a name of it, unless told otherwise."""

    port: int
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    def ask(self, path: str, method: str = "GET", **headers: str | None) -> Answer:
        sent = {**self.headers, **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}", **sent}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, text)

    def until(self, path: str, holds: Callable[[Any], bool], seconds: float = 60.0) -> Any:
        """What the board says at ``path``, when that ``holds``."""
        ends = time.monotonic() + seconds
        while True:
            found = self.ask(path).json
            if holds(found):
                return found
            assert time.monotonic() < ends, found
            time.sleep(0.05)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Client]:
    """The board of ``tmp_path``."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = server_of(application(tmp_path, TOKEN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Client(listening.getsockname()[1])
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run as far as the board reads it; keyword arguments are what ``run.json`` says."""

    def make(name: str = "out", steps: int = 3, **record: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"max_steps": 10, "learning_rate": 1e-3}
        written = {"status": "running", "started": "2026-01-02T03:04:05+00:00", "settings": settings, "total_steps": 10}
        (folder / "run.json").write_text(json.dumps({**written, **record}), encoding="utf-8")
        lines = [
            {"step": step, "epoch": step / 10, "loss": 3.0 - step / 10, "learning_rate": 1e-3, "grad_norm": 1.0}
            | {"seconds": 2.0, "tokens": 100, "target_tokens": 50, "padding_tokens": 10, "peak_memory_mib": 500}
            for step in range(1, steps + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (folder / "sft.log").write_text("2026-01-02T03:04:06+00:00 model: 12 parameters\n", encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def run_settings() -> dict[str, Any]:
    return {"learning_rate": 1e-3, "max_steps": 2}
