from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.redis_server import EmbeddedServer
from tests.service.support import Queue


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
