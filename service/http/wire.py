"""Checks before routing: ambiguous requests, bodies of an unsupported form, and clients that send nothing for too long
are refused."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError, UnsupportedMediaType, error_body
from service.http.description import OPENAI_PATHS, VIDEOS_PATH

JSON_PATHS = ("/generate", *OPENAI_PATHS)
STREAMS = "/events"


class WireCheck:
    """Refuses requests that are malformed on the wire; turns HEAD into GET without the body."""

    def __init__(self, app: ASGIApp, body_timeout_s: float) -> None:
        self._app = app
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if (error := refusal(scope)) is not None:
            body = error_body(error, scope["state"]["request_id"])
            return await JSONResponse(body, error.status, headers={**error.headers, "Connection": "close"})(
                scope, receive, send
            )
        if scope["method"] != "HEAD" or scope["path"].endswith(STREAMS):
            return await self._app(scope, _in_time(receive, self._body_timeout_s), send)
        got = {**scope, "method": "GET"}  # the server goes by its own, which stays HEAD
        try:
            await self._app(got, receive, _without_body(send))
        finally:
            scope["route"] = got.get("route")


def refusal(scope: Scope) -> ServiceError | None:
    """Why a request is refused before its body is read, or None."""
    headers = Headers(scope=scope)
    if "content-length" in headers and "transfer-encoding" in headers:
        message = "Content-Length and Transfer-Encoding contradict each other: send one of them."
        return ServiceError(message, code="bad_request")
    if scope["method"] != "POST" or scope["path"] not in JSON_PATHS:
        return None
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        return UnsupportedMediaType(f"Content-Encoding {encoding[:40]} is not supported: send the body uncompressed.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope["path"] == VIDEOS_PATH and kind == "multipart/form-data":  # OpenAI's client sends nothing else
        return None
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        shown = f", not {kind[:80]}" if kind else ""
        return UnsupportedMediaType(f"The body must be a JSON object with Content-Type: application/json{shown}.")
    return None


def _in_time(receive: Receive, timeout_s: float) -> Receive:
    """``receive`` with a limit on each wait until the body is complete; after that it reports a disconnect."""
    complete = False

    async def receive_in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), timeout_s)
        except TimeoutError:
            raise HTTPException(408, headers={"Connection": "close"}) from None
        complete = not message.get("more_body", False)
        return message

    return receive_in_time


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head
