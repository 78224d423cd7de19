"""The bound on a key's event streams: over all HTTP processes of a queue, and whatever becomes of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest

from service.errors import TooManyStreams
from service.http.streams import KEPT_S, RENEW_S, Streams
from tests.service.http.test_http import check_error
from tests.service.support import Api, Queue, call, eventually


@pytest.fixture
def two(queue: Queue) -> tuple[Streams, Streams]:
    """Those of two processes."""
    return Streams(queue.producer, 2), Streams(queue.producer, 2)


def open_(queue: Queue, streams: Streams, key: str = "ann") -> str:
    return queue.runner.run(streams.open(key))


def test_streams_are_bounded_for_each_key_and_over_all_processes(queue: Queue, two: tuple[Streams, Streams]) -> None:
    here, there = two
    first, _ = open_(queue, here), open_(queue, there)
    for process in two:
        with pytest.raises(TooManyStreams, match="2 streams"):
            open_(queue, process)
        open_(queue, process, f"bob of {id(process)}")
    queue.runner.run(here.close(first))
    open_(queue, there)


def test_those_of_a_dead_process_count_no_longer_than_they_are_renewed(
    queue: Queue, two: tuple[Streams, Streams]
) -> None:
    here, there = two
    open_(queue, here), open_(queue, here)
    name = f"{queue.prefix}st:ann"
    assert RENEW_S < KEPT_S / 2 and 0 < queue.client.pttl(name) <= KEPT_S * 1000
    for stream in queue.client.zrange(name, 0, -1):
        queue.client.zadd(name, {stream: 1})  # as if it had not been renewed
    open_(queue, there)
    assert queue.client.zcard(name) == 1


def test_open_streams_go_on_counting_when_the_server_has_lost_its_data(
    queue: Queue, two: tuple[Streams, Streams]
) -> None:
    here, there = two
    open_(queue, here), open_(queue, here)
    queue.client.delete(f"{queue.prefix}st:ann")
    queue.runner.run(here.renew())
    assert queue.client.zcard(f"{queue.prefix}st:ann") == 2
    with pytest.raises(TooManyStreams):
        open_(queue, there)


def test_a_request_that_is_refused_leaves_no_stream(queue: Queue, two: tuple[Streams, Streams]) -> None:
    async def refused() -> None:
        async with two[0].unless_refused("ann"):
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            queue.runner.run(refused())
    assert not queue.client.exists(f"{queue.prefix}st:ann")


def test_two_http_processes_share_the_bound(make_api: Callable[..., Api]) -> None:
    here, there = make_api(MAX_STREAMS="2"), make_api(MAX_STREAMS="2")
    with stream(here), stream(there) as second:
        for api in (here, there):
            refused = call("POST", f"{api.url}/generate", json={"prompt": "p", "stream": True})
            check_error(refused, 429, "too_many_streams")
        assert len(here.ids()) == 2
        second.close()
        eventually(lambda: here.redis.zcard(f"{here.prefix}st:anonymous") == 1, "a stream that ends counts no more")
        with stream(here):
            pass


def test_two_http_processes_share_the_bound_on_what_waits(make_api: Callable[..., Api]) -> None:
    here, there = make_api(MAX_PENDING="2"), make_api(MAX_PENDING="2")
    later = {"Prefer": "respond-async"}
    for api in (here, there):
        assert call("POST", f"{api.url}/generate", headers=later, json={"prompt": "p"}).status_code == 202
    for api in (here, there):
        check_error(call("POST", f"{api.url}/generate", headers=later, json={"prompt": "p"}), 503, "queue_full")


def stream(api: Api) -> socket.socket:
    """A stream that has begun."""
    body = json.dumps({"prompt": "p", "stream": True}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    connection = socket.create_connection(api.address)
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    return connection


def test_every_stream_is_renewed_however_many_one_call_takes(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.streams.RENEWED_AT_ONCE", 2)
    streams = Streams(queue.producer, 9)
    for key in ("ann", "bob", "ann", "bob", "ann"):
        open_(queue, streams, key)
    queue.client.delete(f"{queue.prefix}st:ann", f"{queue.prefix}st:bob")
    queue.runner.run(streams.renew())
    assert [queue.client.zcard(f"{queue.prefix}st:{key}") for key in ("ann", "bob")] == [3, 2]
