"""Refusals while the queue is full: cheap when there are many, and never a request that the queue would have taken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.http.app import build_app
from service.http.overload import HOLD_S, IN_A_ROW, OverloadGuard, OverloadMiddleware
from service.keys import KeyStore
from service.settings import Settings
from service.supervise.redis_server import EmbeddedServer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_many_refusals_in_a_row_close_it_and_only_for_a_moment() -> None:
    clock = Clock()
    guard = OverloadGuard(clock)
    for _ in range(IN_A_ROW - 1):
        guard.record(True, 7.0)
        assert guard.refusal() is None
    guard.record(False)
    for _ in range(IN_A_ROW):
        assert guard.refusal() is None
        guard.record(True, 7.0)
    refusal = guard.refusal()
    assert refusal is not None and refusal.status == 503 and refusal.headers["Retry-After"] == "7"
    clock.now += HOLD_S
    assert guard.refusal() is None, "somebody asks the queue again"
    guard.record(True, 3.0)
    assert guard.refusal() is not None, "one that is refused is enough now"
    guard.record(False)
    assert guard.refusal() is None


def test_a_key_that_has_used_up_its_quota_closes_it_for_nobody(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.http.overload.HOLD_S", 1e9)
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    app = build_app(Settings(runtime="fake", redis_url=server.url, data_dir=tmp_path / "data", quota=0.001))

    async def codes() -> list[str]:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                asked = {"json": {"prompt": "p"}, "headers": {"Prefer": "respond-async"}}
                assert (await client.post("/generate", **asked)).status_code == 202
                answers = [await client.post("/generate", **asked) for _ in range(IN_A_ROW + 2)]
        return [answer.json()["error"]["code"] for answer in answers]

    try:
        assert runner.run(codes()) == ["quota_exceeded"] * (IN_A_ROW + 2)
    finally:
        server.stop()


def test_a_flood_is_refused_without_the_queue(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end the server is gone: whoever is told that the queue is full was not taken to it."""
    monkeypatch.setattr("service.http.overload.HOLD_S", 1e9)
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    settings = Settings(runtime="fake", redis_url=server.url, data_dir=tmp_path / "data", max_pending=1)
    app = build_app(settings)

    async def post(**headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/generate", json={"prompt": "p"}, headers={"Prefer": "respond-async", **headers})

    async def flood() -> None:
        async with app.router.lifespan_context(app):
            first = await post(**{"Idempotency-Key": "k"})
            assert first.status_code == 202
            for _ in range(IN_A_ROW):
                assert (await post()).json()["error"]["code"] == "queue_full"
            again = await post(**{"Idempotency-Key": "k"})
            assert (again.status_code, again.json()["id"]) == (202, first.json()["id"]), "its job is there"
            for _ in range(IN_A_ROW):
                assert (await post(**{"Idempotency-Key": "other"})).json()["error"]["code"] == "queue_full"
            assert server.process
            server.process.kill()
            refused = await post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1 and refused.headers["X-Request-ID"]
            counted = app.state.services.metrics.text().decode()
            assert f'fewstep_rejected_requests_total{{reason="full"}} {2 * IN_A_ROW + 1:.1f}' in counted
            assert f'{{code="503",method="POST",route="/generate"}} {2 * IN_A_ROW + 1:.1f}' in counted
            KeyStore(settings.data_dir).create("ann")
            assert (await post()).status_code == 401, "a stranger is told nothing else"

    try:
        runner.run(flood())
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("method", "path", "headers", "guarded"),
    [
        ("POST", "/generate", [], True),
        ("POST", "/v1/images/generations", [], True),
        ("POST", "/v1/videos", [], True),
        ("GET", "/v1/videos", [], False),
        ("POST", "/v1/videos/video_1/remix", [], False),
        ("POST", "/jobs/1/cancel", [], False),
        ("POST", "/generate", [(b"idempotency-key", b"k")], False),
    ],
)
def test_only_what_would_put_a_job_into_the_queue_is_refused_without_asking_it(
    method: str, path: str, headers: list[tuple[bytes, bytes]], guarded: bool
) -> None:
    passed, sent = list[str](), list[int]()
    guard, metrics = OverloadGuard(Clock()), SimpleNamespace(rejected=lambda reason: None)
    for _ in range(IN_A_ROW):
        guard.record(True, 7.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    scope = {"type": "http", "method": method, "path": path, "headers": headers, "state": {"request_id": "r"}}
    asyncio.run(OverloadMiddleware(app, guard, metrics)(scope, nothing, send))  # type: ignore[arg-type]
    assert (passed, sent[:1]) == (([], [503]) if guarded else ([path], []))


async def nothing() -> Any:
    raise AssertionError("nobody reads the body")
