"""Boards to look at, and waiting for what they show."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_ui_board.server import application, server_of

TOKEN = "c" * 64


@contextmanager
def board_of(folder: Path) -> Iterator[str]:
    """The address of a board, with its token."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = server_of(application(folder, TOKEN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/#{TOKEN}"
    finally:
        server.should_exit = True
        thread.join(20)


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    ends = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < ends
        time.sleep(0.1)
    return found
