"""What happens around every request: its id, its count, its error.

Pure ASGI on purpose: Starlette's BaseHTTPMiddleware would hide from the routes that a client has gone away.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError, error_body
from service.observe.context import RequestInfo, current_request
from service.observe.metrics import Metrics
from service.observe.tracer import Tracing

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
CLIENT_GONE = 499  # nginx's code; it is never sent, only counted
QUIET = {"/healthz", "/readyz", "/metrics"}  # polled all the time, by machines
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

log = logging.getLogger(__name__)


class RequestContext:
    """Gives each request an id (the client's own, if it sent a usable one), counts it, and turns a crash into a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        info = RequestInfo(_request_id(headers))
        scope.setdefault("state", {}).update(request_id=info.request_id, started=time.perf_counter())
        previous = current_request.set(info)
        try:
            with self._tracing.request(scope["method"], headers) as info.trace_id:
                await self._answer(scope, receive, send, info)
        finally:
            current_request.reset(previous)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, info: RequestInfo) -> None:
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"X-Request-ID": info.request_id, **info.headers})
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed")
            if status != CLIENT_GONE:  # the response has begun: its status can no longer change
                raise
            error = ServiceError()
            await JSONResponse(error_body(error, info.request_id), error.status)(scope, receive, send_with_id)
        finally:
            self._note(scope, status)

    def _note(self, scope: Scope, status: int) -> None:
        """Count and log the request."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        seconds = time.perf_counter() - scope["state"]["started"]
        self._metrics.request(route, method, status, seconds)
        self._tracing.answered(route, method, status)
        level = logging.DEBUG if route in QUIET else logging.INFO
        about = {"method": method, "route": route, "status": status, "duration_s": round(seconds, 4)}
        log.log(level, "request answered", extra=about)


class BodyLimit:
    """Refuses a body that is larger than ``max_bytes``, declared or not, before it is in memory.

    Starlette's own limit answers in plain text; this one goes through the handlers, like every error.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        too_large = declared.isdecimal() and (len(declared) > 12 or int(declared) > self._max_bytes)
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            if too_large:
                raise HTTPException(413)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, receive_limited, send)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
