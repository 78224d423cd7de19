"""Leases in real time: nobody moves a score or a clock here, so what Redis lets expire by itself is seen, too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.queue.consumer import Consumer
from tests.service.support import Queue, eventually

LEASE_S = 0.4
CALL_S = 5 * LEASE_S
WORKERS = 25
RESULT: dict[str, object] = {"images": []}


@dataclass
class Call:
    """A worker in the middle of a call that takes five leases, and the moment when it is killed."""

    queue: Queue
    worker: Consumer
    id: str
    token: str
    killed_s: float
    beats: int = 0

    def beat(self) -> None:
        assert self.worker.beat({}, [(self.id, self.token)]) == {}, "it is alive, and its job is its own"
        self.beats += 1


def begin(queue: Queue, killed_s: float) -> Call:
    id = queue.add()
    worker = queue.consumer("w", lease_s=LEASE_S)
    [claimed] = worker.claim({queue.lane: 1})
    return Call(queue, worker, id, claimed.token, killed_s)


def test_a_worker_that_is_killed_at_any_moment_of_a_long_call_takes_no_job_with_it(
    make_queue: Callable[..., Queue],
) -> None:
    """Nothing else happens in its queue: no enqueue or claim renews anything by the way."""
    chosen = random.Random(1)
    calls = [begin(make_queue(), chosen.uniform(0.0, CALL_S)) for _ in range(WORKERS)]
    began = time.monotonic()
    while living := [call for call in calls if call.killed_s > time.monotonic() - began]:
        for call in living:
            call.beat()
        time.sleep(LEASE_S / 6)
    assert sum(call.beats for call in calls) > WORKERS
    for call in calls:
        eventually(lambda call=call: call.queue.reap() or call.queue.state(call.id) == "queued", "it waits", 10)  # type: ignore[misc]
        assert call.queue.draw() == [call.id] and call.queue.state(call.id) == "done"


def test_a_lease_is_there_as_long_as_its_worker_renews_it(queue: Queue) -> None:
    call = begin(queue, CALL_S)
    began = time.monotonic()
    while time.monotonic() - began < CALL_S:
        call.beat()
        assert queue.client.zscore(f"{queue.prefix}l", call.id), "running, and nobody knows by whom"
        assert queue.reap() == 0
        time.sleep(LEASE_S / 6)
    assert call.worker.finish(call.id, call.token, "done", RESULT) == "done"


def test_a_job_whose_lease_was_lost_ends_with_its_deadline(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(timeout_s=0.3)
    call = begin(queue, 0.0)
    queue.client.delete(f"{queue.prefix}l")  # an older release lets it expire
    eventually(lambda: queue.reap() or queue.state(call.id) == "expired", "it ends", 10)
    assert call.worker.finish(call.id, call.token, "done", RESULT) in ("fenced", "expired")
    assert queue.notices() == [call.id] and queue.leftovers() == set()


def test_a_marked_job_whose_lease_is_lost_later_ends_all_the_same(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(timeout_s=0.2)
    call = begin(queue, 0.0)
    call.beat()
    eventually(lambda: queue.reap() or queue.record(call.id).giving_up, "it is told to its worker", 10)
    queue.client.delete(f"{queue.prefix}l")
    eventually(lambda: queue.reap() or queue.state(call.id) == "expired", "it ends", 20)


def test_a_worker_that_falls_silent_counts_no_more_after_two_leases(queue: Queue) -> None:
    def count() -> int:
        return queue.runner.run(queue.producer.depth()).workers

    began = time.monotonic()
    queue.consumer("w", lease_s=LEASE_S).beat({}, [])
    assert count() == 1
    eventually(lambda: count() == 0, "it is gone", 10)
    assert time.monotonic() - began >= 2 * LEASE_S


def test_a_lease_that_has_run_out_is_looked_at_once(queue: Queue) -> None:
    leases = f"{queue.prefix}l"
    call = begin(queue, CALL_S)
    queue.client.zadd(leases, {call.id: 0})
    assert [queue.reap(), queue.reap()] == [1, 0] and queue.state(call.id) == "queued"
    assert queue.client.zcard(leases) == 0, "whoever claims it begins a lease of its own"
    assert queue.draw() == [call.id] and queue.client.zcard(leases) == 0
    queue.client.zadd(leases, {call.id: 0})  # as of a server that lost its last second
    assert [queue.reap(), queue.reap()] == [1, 0] and queue.state(call.id) == "done"


def test_a_worker_that_is_gone_counts_for_two_leases_while_others_live(queue: Queue) -> None:
    """The set of workers as a whole expires only where nobody is left; a dead one among others has its own time."""
    gone, other = (queue.consumer(name, lease_s=LEASE_S) for name in ("gone", "other"))
    gone.beat({}, [])
    began = time.monotonic()
    while time.monotonic() - began < 3 * LEASE_S:
        other.beat({}, [])
        counted = set(queue.client.zrange(f"{queue.prefix}wk", 0, -1))
        if time.monotonic() - began < LEASE_S:
            assert counted == {"gone", "other"}
        time.sleep(LEASE_S / 6)
    assert counted == {"other"}
