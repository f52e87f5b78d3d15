"""What every request passes before it is looked into: who may ask, how much may come and how fast; and its line."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from visgraft.serve.metrics import Metrics
from visgraft.serve.replies import AsciiJson
from visgraft.serve.settings import ServeConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOG = logging.getLogger("visgraft.serve")
OPEN = ("/", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs")
FILES = ("/page/", "/docs/")
"""Answered without a token: they tell nothing of the adapters, and the page asks for the token itself."""

POLICY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

DOCS = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
"""Of the page that FastAPI makes, whose script stands in it."""


class Guard:
    """Middleware around the application."""

    def __init__(self, app: Any, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.tokens = [token.encode() for token in config.tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500
        headers = dict(scope["headers"])
        scope["state"] = facts = {**scope.get("state", {}), "facts": {}}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                policy = POLICY | ({"content-security-policy": DOCS} if scope["path"] == "/docs" else {})
                added = [(name.encode(), value.encode()) for name, value in policy.items()]
                if status in (408, 413):  # what is still to come is not read
                    added.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            refused = self._refused(scope, headers, facts)
            if refused is None:
                if scope["method"] == "HEAD":  # a copy, as the web server keeps from the original to send no body
                    scope = {**scope, "method": "GET"}
                await self.app(scope, self._limited(receive, headers), sending)
            else:
                await refused(scope, receive, sending)
        finally:
            self._tell(scope, status, time.perf_counter() - begin, facts["facts"])

    def _refused(self, scope: Scope, headers: dict[bytes, bytes], facts: dict[str, Any]) -> AsciiJson | None:
        """Return what is answered to a request that may not be asked; note whose it is."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.config.hosts and name.strip("[]").lower() not in self.config.hosts:
            return said(421, "this server is not called so; ask it by the name or address it was started with")
        facts["owner"] = (scope.get("client") or ("",))[0]
        path = scope["path"]
        if self.tokens and path not in OPEN and not path.startswith(FILES):
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = token.strip()
            known = [hmac.compare_digest(given, one) for one in self.tokens]
            if kind.lower() != b"bearer" or not any(known):
                return said(401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
            facts["owner"] = hashlib.sha256(given).hexdigest()[:12]
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.config.max_body:
            return said(413, self._too_large())
        return None

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """Return a `receive` that ends a body which is too large or too slow."""
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return receive
        got, more, until = 0, True, time.monotonic() + self.config.body_seconds

        async def limited() -> Message:
            nonlocal got, more
            if not more:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0))
            except TimeoutError:
                wanted = f"the body did not arrive within {self.config.body_seconds:g} s; send it faster"
                raise HTTPException(408, wanted) from None
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                more = message.get("more_body", False)
                if got > self.config.max_body:
                    raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return (
            f"the body is larger than the {self.config.max_body:,} bytes that are taken; send fewer or smaller pictures"
        )

    def _tell(self, scope: Scope, status: int, seconds: float, facts: dict[str, Any]) -> None:
        """Count a request and log it; neither a picture nor its name is written anywhere."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        line = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1), **facts}
        LOG.info("request", extra={"facts": line})


def said(status: int, error: str, headers: dict[str, str] | None = None) -> AsciiJson:
    """Return an answer that says what is wrong."""
    return AsciiJson({"error": error}, status, headers)
