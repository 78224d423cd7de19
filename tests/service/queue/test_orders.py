"""What an operator may want of a worker: that it pauses, goes on, or drains."""

from __future__ import annotations

import time
from typing import Any

import pytest

from service.queue.status import Worker, WorkerState
from tests.service.support import Queue

INFO = {"runtime": "fake", "host": "h", "max_batch": 8, "models": {}, "state": "loading"}


def order(queue: Queue, wanted: WorkerState, worker: str = "w") -> str:
    return queue.runner.run(queue.producer.order(worker, wanted))


def workers(queue: Queue) -> list[Worker]:
    return queue.runner.run(queue.producer.workers())


@pytest.mark.parametrize("wanted", [WorkerState.PAUSED, WorkerState.DRAINING])
def test_a_worker_that_is_not_to_claim_gets_nothing_and_keeps_what_it_holds(queue: Queue, wanted: WorkerState) -> None:
    worker, other, ids = queue.consumer("w"), queue.consumer("v"), [queue.add() for _ in range(3)]
    worker.beat(INFO, [])
    (held,) = worker.claim({queue.lane: 1}, "a")
    assert order(queue, wanted) == wanted
    assert worker.claim({queue.lane: 1}, "b") == []
    assert [each.id for each in worker.claim({queue.lane: 1}, "a")] == [held.id], "a repeated call has the same answer"
    assert [each.id for each in other.claim({queue.lane: 1})] == [ids[1]], "others go on"
    assert worker.beat(INFO, [(held.id, held.token)]) == {} and worker.order == wanted
    assert worker.finish(held.id, held.token, "done", {"images": []}) == "done"
    assert queue.state(ids[2]) == "queued" and queue.field(ids[2], "attempts") == "0"


def test_a_paused_worker_is_resumed_and_one_that_drains_is_not(queue: Queue) -> None:
    worker = queue.consumer("w")
    worker.beat(INFO, [])
    id = queue.add()
    assert order(queue, WorkerState.PAUSED) == "paused" and order(queue, WorkerState.READY) == "ready"
    assert [each.id for each in worker.claim({queue.lane: 1})] == [id]
    assert order(queue, WorkerState.DRAINING) == "draining"
    assert order(queue, WorkerState.READY) == "draining" and order(queue, WorkerState.PAUSED) == "draining"
    worker.beat(INFO, [])
    assert worker.order == "draining"


def test_a_worker_that_is_gone_cannot_be_told_anything(queue: Queue) -> None:
    assert order(queue, WorkerState.PAUSED) == "missing"
    worker = queue.consumer("w")
    worker.beat(INFO, [])
    assert order(queue, WorkerState.PAUSED) == "paused"
    worker.release([])
    assert order(queue, WorkerState.READY) == "missing" and not queue.client.exists(f"{queue.prefix}wo:w")
    worker.beat(INFO, [])
    assert worker.order == "", "whoever comes again under its name is as usual"


def test_what_is_wanted_outlives_no_dead_worker_for_long(queue: Queue) -> None:
    worker = queue.consumer("w")
    worker.beat(INFO, [])
    order(queue, WorkerState.PAUSED)
    assert queue.client.ttl(f"{queue.prefix}wo:w") > 0
    queue.consumer("supervisor").lost("w")
    assert not queue.client.exists(f"{queue.prefix}wo:w")


@pytest.mark.parametrize(
    ("info", "state"),
    [
        (INFO, WorkerState.LOADING),
        ({**INFO, "state": "ready"}, WorkerState.READY),
        ({**INFO, "state": "a word of a later release"}, WorkerState.READY),
        ({name: value for name, value in INFO.items() if name != "state"}, WorkerState.READY),
    ],
)
def test_what_a_worker_says_of_itself_is_read_until_an_operator_wants_otherwise(
    queue: Queue, info: dict[str, Any], state: WorkerState
) -> None:
    queue.consumer("w").beat(info, [])
    assert [worker.state for worker in workers(queue)] == [state]
    order(queue, WorkerState.PAUSED)
    assert [(worker.state, worker.claims) for worker in workers(queue)] == [(WorkerState.PAUSED, False)]


def test_a_worker_that_has_fallen_silent_cannot_be_told_anything(queue: Queue) -> None:
    """It is listed until another one beats, and its place says since when it counts no more."""
    queue.consumer("w").beat(INFO, [])
    queue.client.zadd(f"{queue.prefix}wk", {"w": (time.time() - 1) * 1e6})
    assert order(queue, WorkerState.PAUSED) == "missing" and not queue.client.exists(f"{queue.prefix}wo:w")


def test_a_worker_of_which_only_the_name_is_left_is_not_listed(queue: Queue) -> None:
    for name in ("a", "b", "c"):
        queue.consumer(name).beat({**INFO, "host": f"host of {name}"}, [])
    order(queue, WorkerState.DRAINING, "c")
    queue.client.delete(f"{queue.prefix}wi:b")
    found = {worker.id: (worker.host, worker.state) for worker in workers(queue)}
    assert found == {"a": ("host of a", WorkerState.LOADING), "c": ("host of c", WorkerState.DRAINING)}
