"""A board that answers, and folders of runs to show; the rest of what tests share is in plugins/conftest.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from sft_ui_board.server import application

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
    """Asks the board, without a network: with its token, under a name of it, unless told otherwise."""

    app: Any

    def ask(self, path: str, method: str = "GET", **headers: str | None) -> Answer:
        sent = {"Host": "127.0.0.1:8377", "Authorization": f"Bearer {TOKEN}", **headers}
        place, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(place),
            "raw_path": place.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [
                (name.lower().encode(), value.encode("latin-1")) for name, value in sent.items() if value is not None
            ],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8377),
        }
        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        asyncio.run(self.app(scope, receive, send))
        text = b"".join(message.get("body", b"") for message in messages).decode()
        return Answer(
            messages[0]["status"], {name.decode(): value.decode() for name, value in messages[0]["headers"]}, text
        )

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
def board(tmp_path: Path) -> Client:
    """The board of ``tmp_path``."""
    return Client(application(tmp_path, TOKEN))


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
