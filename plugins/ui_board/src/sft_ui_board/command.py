"""``sft board [RUNS_DIR]``: serves the page until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path

import click

import sft

PORT = 8377
LOOPBACK = "127.0.0.1"


@click.command(name="board", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs_dir", default=".", metavar="[RUNS_DIR]")
@click.option("--host", default=LOOPBACK, show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True,
              help="Port to listen at; 0 takes a free one.")  # fmt: skip
def command(runs_dir: str, host: str, port: int) -> None:
    """Follow the runs in RUNS_DIR live, in a browser.

    RUNS_DIR is a folder that holds runs, also in folders of it, or one run; without it, the current one. The page shows
    curves as they grow, when the run will be done, what it says, answers, and the memory of this machine, and has
    buttons to stop, save and evaluate. It is for whoever has the address that is printed: it ends in a token, drawn
    anew each time. Ctrl-C ends the board, and no run.
    """
    folder = Path(runs_dir).expanduser()
    if not folder.is_dir():
        raise sft.UsageError(f"RUNS_DIR {folder} is no folder; give the one that your runs are written to.")
    listening = _listening(host, port)
    token = secrets.token_hex(32)
    named = listening.getsockname()[:2]
    click.echo(f"the board of the runs in {sft.safe(str(folder.resolve()))}; Ctrl-C ends it, and no run")
    if not is_loopback(named[0]):
        click.echo(
            "note: everyone on the network can reach it, and whoever reads along has the token; "
            f"`ssh -L {PORT}:{LOOPBACK}:{PORT}` to a board without --host is safer",
            err=True,
        )
    click.echo(f"http://{_address(host if is_loopback(named[0]) else _name_of(named[0]), named[1])}/#{token}")
    from sft_ui_board.server import application, server_of

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        server_of(application(folder, token, host, is_loopback(named[0]))).run(sockets=[listening])


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    return address == "::1" or address.startswith("127.")


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((address[0], address[1]), family=family)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise sft.UsageError(
            f"The board cannot listen at {sft.shown(host)}, port {port} ({why}); give another --port, or --port 0, "
            "which takes a free one."
        ) from error


def _name_of(address: str) -> str:
    """What a browser elsewhere types for an address; one that stands for all of this machine's is no such name."""
    return socket.gethostname() if address in ("0.0.0.0", "::") else address


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
