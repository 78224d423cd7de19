"""What a heartbeat reports: what was counted since the last one that arrived, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError

from service.observe.background import Background
from service.queue.consumer import Consumer
from service.queue.job import Claimed
from service.worker import heartbeat as module
from service.worker.heartbeat import Heartbeat
from tests.service.support import eventually


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


class Heard(Told):
    """One that also notes what is said, and answers with ``news`` of held jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[dict[str, Any], list[tuple[str, str]], dict[str, int]]] = []
        self.news: dict[str, str] = {}

    def beat(self, *args: Any) -> dict[str, str]:
        super().beat()
        self.said.append(args)  # type: ignore[arg-type]
        return self.news


def of(id: str, token: str = "1") -> Claimed:
    return Claimed(id, token, "", 1, 0.0)


def test_what_is_held_is_renewed_until_it_is_let_go() -> None:
    queue = Heard()
    heartbeat = Heartbeat(cast(Consumer, queue), {"runtime": "fake"}, 60.0)
    heartbeat.hold([of("b", "2"), of("a")])
    heartbeat.beat()
    heartbeat.let_go(of("b", "1"))
    heartbeat.beat()
    heartbeat.let_go(of("b", "2"))
    heartbeat.beat()
    both, alone = [("a", "1"), ("b", "2")], [("a", "1")]
    assert [held for _, held, _ in queue.said] == [both, both, alone] and heartbeat.held() == alone
    assert queue.said[0][0] == {"runtime": "fake", "gpus": {}, "jobs": 2} and queue.said[2][0]["jobs"] == 1


def test_news_of_a_job_are_kept_while_it_is_held_and_are_of_that_claim_alone() -> None:
    queue = Heard()
    heartbeat = Heartbeat(cast(Consumer, queue), {}, 60.0)
    heartbeat.hold([of("a"), of("b")])
    assert heartbeat.dropped(of("a")) is None
    queue.news = {"a": "cancelled", "c": "lost"}
    heartbeat.beat()
    queue.news = {}
    heartbeat.beat()
    assert heartbeat.dropped(of("a")) == "cancelled" and heartbeat.dropped(of("b")) is None
    assert heartbeat.dropped(of("a", "2")) is None and heartbeat.dropped(of("c")) is None
    heartbeat.let_go(of("a"))
    heartbeat.hold([of("a")])
    assert heartbeat.dropped(of("a")) is None


def test_news_of_what_was_let_go_while_the_queue_was_asked_are_not_kept() -> None:
    queue = Heard()
    heartbeat = Heartbeat(cast(Consumer, queue), {}, 60.0)
    heartbeat.hold([of("a"), of("b")])
    queue.news = {"a": "lost", "b": "cancelled"}
    told = queue.beat

    def beat(*args: Any) -> dict[str, str]:
        heartbeat.let_go(of("a"))
        return told(*args)

    queue.beat = beat  # type: ignore[method-assign]
    heartbeat.beat()
    assert heartbeat.dropped(of("a")) is None and heartbeat.dropped(of("b")) == "cancelled"


def test_failures_are_reported_once_and_again_where_the_beat_did_not_arrive() -> None:
    queue, background = Heard(), Background()
    heartbeat = Heartbeat(cast(Consumer, queue), {}, 60.0, background=background)
    duty = background.duty("probe")
    for away in (False, True, False, False):
        queue.away = away
        if len(queue.beats) < 2:
            duty.failed(OSError())
        try_said = len(queue.said)
        heartbeat.beat()
        assert len(queue.said) == try_said + (not away)
    assert [failed for *_, failed in queue.said] == [{"probe": 1}, {"probe": 1}, {"probe": 0}]


def test_what_an_operator_wants_is_said_back() -> None:
    queue = Heard()
    heartbeat = Heartbeat(cast(Consumer, queue), {"state": "ready"}, 60.0)
    for order in ("paused", "", ""):
        queue.order = order
        heartbeat.beat()
    assert [about["state"] for about, *_ in queue.said] == ["ready", "paused", "ready"]


def test_the_gpus_are_measured_at_the_start_and_said() -> None:
    queue = Heard()
    gpus = {"GPU-1": {"busy": 0.5}}
    accelerators: Any = SimpleNamespace(measure=lambda: gpus)
    with Heartbeat(cast(Consumer, queue), {}, 60.0, accelerators):
        pass
    assert queue.said[0][0]["gpus"] == gpus


@pytest.mark.parametrize("answers", [0, 1])
def test_leases_are_renewed_though_a_driver_raises(answers: int) -> None:
    queue, asked = Heard(), list[float]()

    def measure() -> dict[str, dict[str, float]]:
        asked.append(time.monotonic())
        if len(asked) > answers:
            raise AttributeError("another driver than the library knows")
        return {"GPU-1": {"busy": 0.5}}

    with Heartbeat(cast(Consumer, queue), {}, 0.05, cast(Any, SimpleNamespace(measure=measure))) as heartbeat:
        eventually(lambda: len(queue.said) >= 6)
    assert len(asked) == answers + 1 and heartbeat.background.broken is None
    assert queue.said[-1][0]["gpus"] == {}, "a GPU that stops answering is no longer reported"


def test_the_gpus_are_measured_again_though_a_worker_that_draws_never_stops_asking_for_news() -> None:
    queue, measured = Heard(), list[int]()

    def measure() -> dict[str, dict[str, float]]:
        measured.append(len(measured))
        return {"GPU-1": {"busy": float(len(measured))}}

    accelerators: Any = SimpleNamespace(measure=measure)
    with Heartbeat(cast(Consumer, queue), {}, 0.3, accelerators) as heartbeat:
        until = time.monotonic() + 10.0
        while len(measured) < 3 and time.monotonic() < until:
            heartbeat.ask()
            time.sleep(0.002)
        eventually(lambda: queue.said[-1][0]["gpus"]["GPU-1"]["busy"] >= 3.0, "the third measurement is said")
    assert len(measured) < len(queue.said), "and not in every beat"


@pytest.mark.parametrize("answers", [0, 1])
def test_leases_are_renewed_though_a_driver_hangs(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_MEASURED_S", 0.05)
    monkeypatch.setattr(module, "STALE_S", 0.2)
    queue, asked, freed = Heard(), list[int](), threading.Event()

    def measure() -> dict[str, dict[str, float]]:
        asked.append(len(asked))
        if len(asked) > answers:
            freed.wait(60.0)
        return {"GPU-1": {"busy": 0.5}}

    started = threading.Thread(target=lambda: _beat_until(queue, measure, 6), daemon=True)
    started.start()
    started.join(20.0)
    alive, beats = started.is_alive(), len(queue.said)
    freed.set()
    assert not alive and beats >= 6 and len(asked) == answers + 1


def _beat_until(queue: Heard, measure: Callable[[], Any], beats: int) -> None:
    with Heartbeat(cast(Consumer, queue), {}, 0.05, cast(Any, SimpleNamespace(measure=measure))):
        eventually(lambda: len(queue.said) >= beats and queue.said[-1][0]["gpus"] == {}, "stale figures are left out")
