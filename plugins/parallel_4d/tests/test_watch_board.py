"""Whom the board of the watch lets in, and what it believes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from processes import free_ports

from sft_parallel_4d import door
from sft_parallel_4d.board import LONGEST, STRANGERS, Board
from sft_parallel_4d.watch import OtherRankError, Watch


@pytest.fixture
def board() -> Iterator[Board]:
    (port,) = free_ports(1)
    board = Board("127.0.0.1", port, 2, 5, 0.5, "the token")
    yield board
    board.close()


def connected(board: Board) -> tuple[socket.socket, Any]:
    line = socket.create_connection(board.server_address[:2], timeout=5)
    return line, line.makefile("rwb")


HELLO = {"rank": 0, "count": [1, 0], "phase": "x", "waited": None, "asked": 7}
NEWS = {**HELLO, "error": "\x1b[2J"}


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b'{"rank": 7}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b"[" * 1000 + b"\n",
        b"x" * 100_000,
        json.dumps(NEWS).encode() + b"\n",
        b'{"nonce": "a", "proof": "b", "rank": 0}\n',
        b'{"nonce": "a", "proof": "\\u00e4", "rank": 0}\n',
    ],
)
def test_the_board_leaves_strangers_alone(board: Board, noise: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    line, stream = connected(board)
    with line:
        assert set(json.loads(stream.readline())) == {"nonce"}
        with contextlib.suppress(ConnectionError):
            line.sendall(noise)
            assert stream.read() in (b"", b"{}\n")
    assert (board.first, board.all_done(), capfd.readouterr()) == (None, False, ("", ""))


@pytest.mark.parametrize("key", ["", "another token"])
def test_without_the_token_nobody_gets_in(board: Board, key: str) -> None:
    line, stream = connected(board)
    with line, pytest.raises(door.StrangerError):
        door.enter(stream, stream, key, 0)


@pytest.mark.parametrize("guesses", [True, False])
def test_one_who_has_taken_the_port_is_no_board(guesses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """He knows what the board and a rank say to each other, but not the token."""
    monkeypatch.setenv(door.TOKEN, "the token")

    def serve() -> None:
        line, _ = server.accept()
        with line, line.makefile("rwb") as stream:
            if guesses:
                with contextlib.suppress(door.StrangerError):
                    door.let_in(stream, stream, "a guess")
            else:
                stream.write(b'{"nonce": "a"}\n{"proof": "b"}\n')
                stream.flush()
            stream.read()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        watch = Watch(1, 2, 5, print, (0, *server.getsockname()))
        with pytest.raises(
            OtherRankError, match="is not rank 0 of this run, or has another token; set SFT_LAUNCH_TOKEN"
        ):
            watch._connect()
        thread.join()


@pytest.mark.parametrize(
    "wrong",
    [
        b"\n",
        b"[1]\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        *(
            json.dumps({**HELLO, **change}).encode() + b"\n"
            for change in (
                {"rank": 1},
                {"rank": "0"},
                {"asked": None},
                {"count": 1},
                {"count": [1]},
                {"count": [1.5, 0]},
                {"count": [True, 0]},
                {"count": None},
                {"phase": 1},
                {"waited": "x"},
                {"waited": float("nan")},
                {"waited": -1},
                {"waited": True},
                {"brings": [1.0]},
                {"brings": {}},
                {"brings": {"mean": [1.0]}},
                {"brings": {"sum": [1.0], "largest": [1.0]}},
                {"brings": {"sum": 1.0}},
                {"brings": {"sum": ["1"]}},
                {"error": 1},
                {"error": "x" * LONGEST},
            )
        ),
    ],
)
def test_lines_that_no_rank_says(board: Board, wrong: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """The connection ends, as that of a rank which is gone, and nothing of the line is repeated."""
    line, stream = connected(board)
    with line:
        door.enter(stream, stream, "the token", 0)
        with contextlib.suppress(ConnectionError):
            line.sendall(wrong)
            assert stream.read() == b""
    assert (board.first, capfd.readouterr()) == (None, ("", ""))


def test_a_rank_is_connected_once_and_speaks_for_itself(board: Board) -> None:
    line, stream = connected(board)
    with line:
        door.enter(stream, stream, "the token", 0)
        stream.write(json.dumps(HELLO).encode() + b"\n")
        stream.flush()
        assert json.loads(stream.readline()) == {"first": None, "absent": [1], "together": None, "asked": 7}
        for rank in (0, 2, -1, "1", None, 10**30):
            other, beside = connected(board)
            with other:
                door.enter(beside, beside, "the token", rank)
                assert beside.readline() == b""
        assert board.first is None


def test_strangers_keep_no_rank_out(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many that say nothing are hung up on; after the time that they have, a rank gets in."""
    monkeypatch.setattr("sft_parallel_4d.board.SECONDS", 0.5)
    monkeypatch.setenv(door.TOKEN, "the token")
    idle = [connected(board) for _ in range(STRANGERS + 40)]
    watch = Watch(0, 2, 20, print, (0, *board.server_address[:2]))
    with watch._connect():
        assert watch._ask() == {"first": None, "absent": [1], "together": None, "asked": 1}
    for line, _ in idle:
        line.close()


def test_the_board_listens_where_the_ranks_are_told_to_go(board: Board) -> None:
    assert board.server_address[0] == "127.0.0.1"
    (port,) = free_ports(1)
    elsewhere = Watch(0, 1, 5, print, (0, "192.0.2.1", port))._serve()  # an address of no machine, as behind a gateway
    assert elsewhere.server_address[0] == "0.0.0.0"
    elsewhere.close()
