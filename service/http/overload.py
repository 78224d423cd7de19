"""Refuses cheaply while the queue is full: what it has refused again and again need not be asked every time."""

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
IN_A_ROW = 8  # fewer refusals are no overload: each of those is the queue's own
HOLD_S = 0.05  # then one request may ask the queue again


@dataclass(frozen=True)
class _Refused:
    """Stands for the route that was not looked for, where requests are counted."""

    path: str


class OverloadGuard:
    """Remembers what the queue said of late. Only of this process, and only for a moment: the queue is the truth."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_a_row = 0
        self._closed_until = 0.0
        self._wait_s = 0.0

    def record(self, full: bool, wait_s: float = 0.0) -> None:
        """Note whether the queue has refused a job for being full; ``wait_s``: when another try is worth it."""
        self._in_a_row = self._in_a_row + 1 if full else 0
        self._wait_s = wait_s
        self._closed_until = self._clock() + HOLD_S if self._in_a_row >= IN_A_ROW else 0.0

    def refusal(self) -> QueueFull | None:
        """What to answer without asking the queue, if it need not be asked."""
        if self._clock() >= self._closed_until:
            return None
        return QueueFull("The queue is full: too many jobs are waiting.", retry_after_s=self._wait_s)


class OverloadMiddleware:
    """Answers for the guard, before a body is read. A request with an Idempotency-Key passes: its job may be there."""

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
