from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.keys import KeyStore
from service.supervise.redis_server import EmbeddedServer
from tests.service.http.browser import Page, chromium, open_browser
from tests.service.support import Api, Queue, Service, running_service


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server, shared: each test uses a model name of its own."""
    server = EmbeddedServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def make_queue(redis_url: str, runner: asyncio.Runner) -> Iterator[Callable[..., Queue]]:
    queues: list[Queue] = []

    def make(**limits: Any) -> Queue:
        queues.append(Queue(redis_url, runner, **limits))
        return queues[-1]

    yield make
    for queue in queues:
        runner.run(queue.close())


@pytest.fixture
def queue(make_queue: Callable[..., Queue]) -> Queue:
    return make_queue()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A whole service, for tests that leave it as they found it."""
    with running_service(tmp_path_factory.mktemp("live") / "data") as service:
        yield service


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, KeyStore]]:
    """A whole service that needs keys."""
    data_dir = tmp_path_factory.mktemp("keyed") / "data"
    keys = KeyStore(data_dir)
    keys.create("first")
    with running_service(data_dir) as service:
        yield service, keys


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A real browser; skipped without one, but not in a continuous integration."""
    program = chromium()
    if program is None:
        assert not os.environ.get("CI"), "no chromium on PATH, and this is a continuous integration"
        pytest.skip("no chromium on PATH")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def make_api(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """HTTP processes without a worker, on a server of their own."""
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    apis: list[Api] = []

    def make(**settings: str) -> Api:
        apis.append(Api(server.url, tmp_path / "data", **settings))
        return apis[-1]

    yield make
    for api in apis:
        api.close()
    server.stop()
