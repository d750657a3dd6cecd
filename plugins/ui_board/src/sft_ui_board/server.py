"""The board as a program that answers: the page, its files, and what it asks for; by Starlette, served by uvicorn."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import sft
from sft_ui_board.guard import Guard
from sft_ui_board.orders import KINDS, ask
from sft_ui_board.watch import Unknown, Watch, harmless, machine

ASSETS = Path(__file__).parent / "assets"


def application(root: Path, token: str, host: str = "127.0.0.1", loopback: bool = True) -> Starlette:
    """The board of the runs below ``root``, to be asked under ``host`` and names of this machine, with ``token``."""
    watch, lock = Watch(root.resolve()), threading.Lock()

    def runs(request: Request) -> Response:
        with lock:
            return _json({"folder": str(watch.root), "machine": machine(), "runs": watch.lines()})

    def run(request: Request) -> Response:
        with lock:
            return _json(watch.run(*(request.query_params.get(key, "") for key in ("run", "seen", "log_seen"))))

    def order(request: Request) -> Response:
        kind = request.query_params.get("what", "")
        if kind not in KINDS:
            raise sft.UsageError(f"There is nothing to ask of a run but {', '.join(KINDS)}.")
        with lock:
            ask(watch.named(request.query_params.get("run", "")).folder, kind)
        return _json({"asked": kind})

    script, style = sft.chart_library()
    files = {
        "/": ("text/html", (ASSETS / "board.html").read_text(encoding="utf-8")),
        "/board.js": ("text/javascript", (ASSETS / "board.js").read_text(encoding="utf-8")),
        "/board.css": ("text/css", (ASSETS / "board.css").read_text(encoding="utf-8")),
        "/charts.js": ("text/javascript", script),
        "/charts.css": ("text/css", style),
    }
    return Starlette(
        routes=[
            *(Route(path, partial(_file, *file), methods=["GET"]) for path, file in files.items()),
            Route("/api/runs", runs, methods=["GET"]),
            Route("/api/run", run, methods=["GET"]),
            Route("/api/ask", order, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, token=token, host=host, loopback=loopback)],
        exception_handlers={sft.SftError: _said, OSError: _said},
    )


def server_of(app: Starlette) -> uvicorn.Server:
    """What serves ``app``: ``run(sockets=[…])`` answers until a signal, or ``should_exit``, ends it."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        limit_concurrency=100,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _file(kind: str, text: str, request: Request) -> Response:
    return Response(text, media_type=kind)


def _json(value: Any, code: int = 200) -> Response:
    return Response(json.dumps(harmless(value), allow_nan=False), code, media_type="application/json")


def _said(request: Request, error: Exception) -> Response:
    """What went wrong, in a sentence."""
    return _json({"error": str(error)}, 404 if isinstance(error, Unknown) else 409)
