"""What stands before the service: whom it answers, and how large and how slow a request may be.

The gate reads a request whole before anything else sees it, up to a size and a time, so that neither Ray Serve's proxy nor a
replica ever holds more, whatever a client sends or does not send. It stands in the proxy of a Ray that `raydml serve` has started
(`proxy_middlewares`), and before the replica's own application, on any cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN = "RAYDML_SERVE_TOKEN"  # environment variable with the token that clients have to send
LIMITS = "RAYDML_SERVE_LIMITS"  # environment variable that brings the limits to Ray Serve's proxy
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
OPEN_PATHS = {
    "/",
    "/page.css",
    "/results.css",
    "/page.js",
    "/health",
}  # answered without a token: they tell nothing of the images
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_LINGER_S = 1.0  # how long a body that is refused is still read, so that the client sees the answer


@dataclass(frozen=True)
class Limits:
    """Of a request.

    Attributes:
        upload_bytes: Largest body.
        upload_s: How long a body may take to arrive.
        uploads: Requests that are read or answered at once.
        token_sha256: Digest of the token, "" for none: the token itself is in no file and no message of Ray's.
        hosts: Names that a request may call this service by (its Host header); empty: any. A page of another site that
            has its own name point to 127.0.0.1 is kept out by it.
    """

    upload_bytes: int = 20 * 10**6
    upload_s: float = 20.0
    uploads: int = 64
    token_sha256: str = ""
    hosts: tuple[str, ...] = ()


def digest(token: str) -> str:
    """What is kept of a token; "" for none."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


class _RefusedError(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Gate:
    """An ASGI middleware that passes on what keeps the limits.

    Answers 401 without the token, 408 for a body that comes too slowly, 413 for one that is too large (also one that does not
    say its length), 421 for another host, 503 while too many requests are under way.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits, self.under_way = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            self.under_way += 1
            try:
                body = await self._read(receive, int(headers.get("content-length") or 0))
                if body is not None:
                    await self.app(scope, _replay(body, receive), send)
            finally:
                self.under_way -= 1
        except _RefusedError as error:
            await _answer(send, error)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        """Raises _RefusedError for what the headers tell already."""
        limits = self.limits
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if limits.hosts and name.lower() not in limits.hosts:
            raise _RefusedError(421, "this service is not known by that host name")
        if limits.token_sha256 and path not in OPEN_PATHS:
            kind, _, token = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(digest(token.strip()).encode(), limits.token_sha256.encode())
            if kind.lower() != "bearer" or not right:
                challenge = {"www-authenticate": 'Bearer realm="raydml"'}
                raise _RefusedError(401, "a token is needed: send it as Authorization: Bearer TOKEN", challenge)
        length = headers.get("content-length") or "0"
        if not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise _RefusedError(400, "the header Content-Length is no number")
        if self.under_way >= limits.uploads:
            raise _RefusedError(503, "too many requests are under way", {"retry-after": "1"})

    async def _read(self, receive: Receive, announced: int) -> bytes | None:
        """The body; None if the client has gone."""
        limits = self.limits
        parts: list[bytes] = []
        arrived = 0
        try:
            async with asyncio.timeout(limits.upload_s):
                while max(arrived, announced) <= limits.upload_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    arrived += len(parts[-1])
                    if not message.get("more_body", False) and arrived <= limits.upload_bytes:
                        return b"".join(parts)
        except TimeoutError as error:
            raise _RefusedError(408, f"the upload took more than {limits.upload_s:g} seconds") from error
        parts.clear()
        await _linger(receive)
        raise _RefusedError(413, f"the upload is larger than {limits.upload_bytes:,} bytes")


async def _linger(receive: Receive) -> None:
    """Reads on for a moment and keeps nothing: a connection that is closed while its client writes loses the answer."""
    try:
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read: the body, then what comes after it (the end of the connection)."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _answer(send: Send, error: _RefusedError) -> None:
    body = json.dumps({"error": str(error)}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-content-type-options": "nosniff",
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def announce(limits: Limits) -> None:
    """Has the proxies of a Ray that this process starts put the gate before everything."""
    os.environ[LIMITS] = json.dumps(asdict(limits))
    os.environ[CALLBACK] = f"{__name__}.proxy_middlewares"


def proxy_middlewares() -> list[Any]:
    """What Ray Serve's proxy puts before its own application; it finds this function by the name in CALLBACK."""
    from starlette.middleware import Middleware

    values = json.loads(os.environ[LIMITS])
    return [Middleware(Gate, limits=Limits(**values | {"hosts": tuple(values["hosts"])}))]


__all__ = ["LOCAL_HOSTS", "TOKEN", "Gate", "Limits", "announce", "digest"]
