"""Headers and bounds that other programs rely on: browsers, proxies in between, load balancers."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from service.http import server
from service.settings import Settings
from tests.service.support import Service, call, post

POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; frame-ancestors 'none'"


@pytest.mark.parametrize("path", ["/", "/docs", "/page/page.js"])
def test_the_page_runs_nothing_but_its_own_scripts(live: Service, path: str) -> None:
    answer = call("GET", live.url + path)
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_picture_is_what_it_says_it_is(live: Service) -> None:
    """A browser must not take it for a page, whatever its bytes look like."""
    answer = post(live.url, prompt="a", response_format="file")
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
    url = post(live.url, prompt="a", response_format="url").json()["data"][0]["url"]
    assert call("GET", url).headers["x-content-type-options"] == "nosniff"


def test_a_proxy_in_between_does_not_keep_events_back(live: Service) -> None:
    body = {"prompt": "a", "stream": True}
    with httpx.stream("POST", f"{live.url}/generate", json=body, timeout=30, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no" and answer.headers["cache-control"] == "no-store"
        answer.read()


def test_a_connection_outlives_the_idle_time_of_load_balancers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """60 s is what common ones have: they must be the ones who close."""
    found: list[Any] = []

    class Noted:
        def __init__(self, config: Any, *_: object, **__: object) -> None:
            found.append(config)

        def run(self, **_: object) -> None:
            pass

    monkeypatch.setattr(server, "Server", Noted)
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    settings = Settings(runtime="fake", redis_url="redis://127.0.0.1:1", data_dir=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.run_server(settings, listener)
    assert found[0].timeout_keep_alive > 60
