"""Who may talk to the board: whoever has the token of this run, and shows it without saying it.

Both sides prove it, each to a number that the other has just drawn: a stranger who listens learns nothing that lets him
in later, and one who has taken the port is no board. The token comes by the environment, which other users do not see.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from typing import Any

TOKEN = "SFT_LAUNCH_TOKEN"
"""The environment variable with the token: ``--nproc`` draws one; for other launchers it is whatever the user sets."""
SECONDS = 10.0
"""In which a stranger has to have shown the token."""
GREETING = 1 << 10
"""Bytes of a line of somebody who has not."""


class StrangerError(Exception):
    """The other side does not have the token, or speaks otherwise."""


def token() -> str:
    """This run's; empty where nobody has set one."""
    return os.environ.get(TOKEN, "")


def new_token() -> str:
    return secrets.token_hex(32)


def let_in(reader: Any, writer: Any, key: str) -> Any:
    """The board's side, over binary streams: the number that the rank gives for itself, once it has shown ``key``."""
    ours = new_token()
    _write(writer, {"nonce": ours})
    said = _read(reader)
    theirs = said.get("nonce")
    if not isinstance(theirs, str) or not _equal(said.get("proof"), _proof(key, "rank", ours, theirs)):
        _write(writer, {})  # a rank with another token is told at once, and does not try again
        raise StrangerError("no proof")
    _write(writer, {"proof": _proof(key, "board", ours, theirs)})
    return said.get("rank")


def enter(reader: Any, writer: Any, key: str, rank: int) -> None:
    """A rank's side of :func:`let_in`. Raises :class:`StrangerError` where the board does not have ``key`` either."""
    theirs = _read(reader).get("nonce")
    if not isinstance(theirs, str):
        raise StrangerError("no greeting")
    ours = new_token()
    _write(writer, {"nonce": ours, "proof": _proof(key, "rank", theirs, ours), "rank": rank})
    if not _equal(_read(reader).get("proof"), _proof(key, "board", theirs, ours)):
        raise StrangerError("no proof")


def _proof(key: str, side: str, board: str, rank: str) -> str:
    return hmac.new(key.encode(), f"{side} {board} {rank}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _equal(given: Any, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _write(writer: Any, said: dict[str, Any]) -> None:
    writer.write(json.dumps(said).encode() + b"\n")
    writer.flush()


def _read(reader: Any) -> dict[str, Any]:
    line = reader.readline(GREETING)
    if not line:
        raise EOFError
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StrangerError("no JSON") from error
    if not isinstance(said, dict):
        raise StrangerError("no object")
    return said
