"""What a heartbeat reports: what was counted since the last one that arrived, once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

from redis.exceptions import ConnectionError

from service.queue.consumer import Consumer
from service.worker.heartbeat import Heartbeat


class Told:
    """A queue that is out of reach now and then, and notes what it is told to add."""

    def __init__(self) -> None:
        self.order = ""
        self.away = False
        self.added: list[dict[str, int]] = []
        self.beats: list[float] = []

    def beat(self, *_: Any) -> dict[str, str]:
        self.beats.append(time.monotonic())
        if self.away:
            raise ConnectionError("away")
        return {}

    def count(self, counts: Mapping[str, int]) -> None:
        self.added.append(dict(counts))


def test_what_was_counted_is_reported_once_and_after_an_outage() -> None:
    queue, counts = Told(), {"device_busy_ms": 5}
    heartbeat = Heartbeat(cast(Consumer, queue), {}, 60.0, counts=lambda: counts)
    heartbeat.beat()
    heartbeat.beat()
    assert queue.added == [{"device_busy_ms": 5}]
    counts["device_busy_ms"], queue.away = 7, True
    heartbeat.beat()
    queue.away = False
    heartbeat.beat()
    assert queue.added == [{"device_busy_ms": 5}, {"device_busy_ms": 2}]


def test_an_operators_wish_is_followed_and_told_at_once() -> None:
    queue, drained = Told(), list[bool]()
    heartbeat = Heartbeat(cast(Consumer, queue), {}, 60.0, on_drain=lambda: drained.append(True))
    heartbeat.beat()
    assert heartbeat.claims and not heartbeat.drains
    queue.order = "paused"
    heartbeat.beat()
    assert not heartbeat.claims and not heartbeat.drains and drained == []
    queue.order = "draining"
    heartbeat.beat()
    assert heartbeat.drains and drained == [True]


def test_however_often_news_are_asked_for_there_are_ten_beats_a_second() -> None:
    """Calls of a few milliseconds ask after each of their steps, and a beat costs the worker and the queue."""
    queue = Told()
    with Heartbeat(cast(Consumer, queue), {}, 60.0) as heartbeat:
        until = time.monotonic() + 0.55
        while time.monotonic() < until:
            heartbeat.ask()
            time.sleep(0.002)
    _, first, *others = queue.beats
    assert others and all(after - before >= 0.1 for before, after in zip([first, *others], others, strict=False))
