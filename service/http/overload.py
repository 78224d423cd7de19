"""Load shedding: while the queue keeps refusing jobs, requests are refused without asking it each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import QueueFull, error_body
from service.http.description import OPENAI_PATHS
from service.http.preferences import KEY_HEADER
from service.observe.metrics import Metrics

GUARDED = ("/generate", *OPENAI_PATHS)
IN_A_ROW = 8  # after fewer refusals, every request still asks the queue
HOLD_S = 0.05  # then one request may ask the queue again


@dataclass(frozen=True)
class _Refused:
    """Stands in for the route, which was not resolved, where requests are counted."""

    path: str


class OverloadGuard:
    """Remembers the queue's latest verdicts, in this process and for a moment only: the queue is the authority."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_a_row = 0
        self._closed_until = 0.0
        self._wait_s = 0.0

    def record(self, full: bool, wait_s: float = 0.0) -> None:
        """Record whether the queue refused a job because it is full; ``wait_s``: after how long to retry."""
        self._in_a_row = self._in_a_row + 1 if full else 0
        self._wait_s = wait_s
        self._closed_until = self._clock() + HOLD_S if self._in_a_row >= IN_A_ROW else 0.0

    def refusal(self) -> QueueFull | None:
        """The refusal to send without asking the queue, or None if it should be asked."""
        if self._clock() >= self._closed_until:
            return None
        return QueueFull(retry_after_s=self._wait_s)


class OverloadMiddleware:
    """Sends the guard's refusals before a body is read. An Idempotency-Key passes: its job may exist already."""

    def __init__(self, app: ASGIApp, guard: OverloadGuard, metrics: Metrics) -> None:
        self._app = app
        self._guard = guard
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._guard.refusal() if _guarded(scope) else None
        if error is None:
            return await self._app(scope, receive, send)
        scope["route"] = _Refused(scope["path"])
        self._metrics.rejected("full")
        body = error_body(error, scope["state"]["request_id"])
        await JSONResponse(body, error.status, headers=error.headers)(scope, receive, send)


def _guarded(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in GUARDED:
        return False
    return KEY_HEADER.lower() not in Headers(scope=scope)
