"""Who may ask the board for something: whoever has its token, by its own name. Everybody else gets one sentence."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/api/"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""What the page may do: run and draw by the files of the board, and ask the board. Text never becomes markup."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets through what is asked under a name of this machine, and of ``/api/`` only what carries the token.

    The name is the ``Host`` of the request. A page of somebody else's, whose name has been made to lead here (DNS
    rebinding), asks under its own; so does one that only knows the port. Neither knows the token, and no other page may
    read an answer, for none says that it may (CORS)."""

    def __init__(self, app: ASGIApp, token: str, host: str, loopback: bool) -> None:
        self._app, self._token, self._loopback = app, token.encode(), loopback
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        if not loopback:
            self._names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refused = None
        if not self.knows(headers.get("host", "")):
            refused = JSONResponse({"error": "The board answers under its own address alone."}, 421)
        elif scope["path"].startswith(API) and not self._has_token(headers.get("authorization", "")):
            said = "The token is missing or old; open the address that sft board has printed."
            refused = JSONResponse({"error": said}, 401)
        await (refused or self._app)(scope, receive, sending)

    def knows(self, host: str) -> bool:
        """Whether ``host``, a name with or without a port, is this machine's. Where the board listens to the network,
        so is each address in digits, which no name server can turn elsewhere."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") <= 1:
            name = name.partition(":")[0]
        if name in self._names:
            return True
        return not self._loopback and _is_address(name)

    def _has_token(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
