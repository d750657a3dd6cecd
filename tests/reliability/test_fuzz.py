"""Input that is made up at random: each reader gives a value, or refuses it in one sentence and in time."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzzing import TARGETS
from fuzzing.made_up import as_json, numbers, values, words
from fuzzing.trial import FEW, MANY, Target, fuzz
from hypothesis import strategies as st

from reliability.figures import record
from sft_parallel_4d import board as board_module
from sft_parallel_4d import door
from sft_parallel_4d.board import Board

pytestmark = pytest.mark.sweep  # as far as its tests are slow


@pytest.mark.parametrize("name", TARGETS)
def test_a_few(name: str) -> None:
    fuzz(TARGETS[name], FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.row("fuzzing", "{name}")
@pytest.mark.parametrize("name", TARGETS)
def test_many(name: str) -> None:
    began = time.monotonic()
    count = fuzz(TARGETS[name], MANY)
    record("fuzzing", name, inputs=count, wrong=0, seconds=time.monotonic() - began)


# --- the socket of parallel runs ----------------------------------------------------------------------------

SAID = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.sampled_from([0, 1, 2, -1, True, 10**30]) | values,
        "count": st.lists(st.integers(-1, 3) | numbers, max_size=3) | values,
        "phase": words,
        "waited": st.none() | numbers | values,
        "asked": st.integers(-1, 3) | values,
        "brings": st.dictionaries(st.sampled_from(["sum", "largest", "mean"]), st.lists(numbers) | values) | values,
        "done": values,
        "error": st.none() | values,
    },
)
LINES = st.lists((SAID | values).map(as_json) | st.binary(max_size=40) | st.just(b"[" * 50_000), max_size=4)


CLOSING = ThreadPoolExecutor(8)
"""A board takes up to a tenth of a second to end, which the next one need not wait for."""


def board_hears(lines: list[bytes]) -> None:
    """Whatever is said to it, the board can tell who is missing, and a rank is answered."""
    board = Board("127.0.0.1", 0, 2, timeout=60, beat=0.01, key="token")
    try:
        board.handle_error = lambda *_: pytest.fail("a connection ended in a traceback")  # type: ignore[method-assign]
        for line in lines:
            where = ("127.0.0.1", board.server_address[1])
            # It is hung up on as soon as it says something wrong.
            with socket.create_connection(where, timeout=10) as strange, contextlib.suppress(OSError):
                strange.sendall(line + b"\n")
                strange.shutdown(socket.SHUT_WR)
                strange.recv(1 << 16)
            with socket.create_connection(("127.0.0.1", board.server_address[1]), timeout=10) as known:
                stream = known.makefile("rwb")
                with contextlib.suppress(OSError, EOFError):  # once it is heard, it is connected for good
                    door.enter(stream, stream, "token", 0)
                    known.sendall(line + b"\n")
                    known.shutdown(socket.SHUT_WR)
                    known.recv(1 << 16)
        good = {"rank": 1, "asked": 1, "count": [1, 0], "phase": "reading", "waited": None}
        with socket.create_connection(("127.0.0.1", board.server_address[1]), timeout=10) as rank:
            stream = rank.makefile("rwb")
            door.enter(stream, stream, "token", 1)
            rank.sendall(as_json(good) + b"\n")
            answer = json.loads(stream.readline())
            assert set(answer) == {"first", "absent", "together", "asked"}
            text = board.missing()[1]
            assert text.isprintable()
    finally:
        CLOSING.submit(board.close)


def test_a_few_messages_to_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "SETTLE", 0.0)
    fuzz(BOARD, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.row("fuzzing", "messages on the socket of parallel runs, with its token and without")
def test_many_messages_to_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "SETTLE", 0.0)
    began = time.monotonic()
    count = fuzz(BOARD, MANY)
    record("fuzzing", "messages on the socket of parallel runs, with its token and without", inputs=count, wrong=0,
           seconds=time.monotonic() - began)  # fmt: skip


BOARD = Target(LINES, lambda folder, lines: board_hears(lines))
