"""Nothing in the queue's server grows without end: notices, wake-ups and dead jobs are bounded in number."""

from __future__ import annotations

from tests.service.support import Queue


def test_notices_that_nobody_reads_are_bounded(queue: Queue) -> None:
    stream = f"{queue.prefix}r:api"
    with queue.client.pipeline(transaction=False) as many:
        for _ in range(12_000):
            many.xadd(stream, {"id": "x", "what": "end"})
        many.execute()
    queue.add()
    queue.draw()
    assert 10_000 <= int(queue.client.xlen(stream)) <= 10_500  # bounded in whole nodes of the stream


def test_wake_ups_that_nobody_waits_for_are_bounded(queue: Queue) -> None:
    for _ in range(70):
        queue.add()
    assert int(queue.client.llen(f"{queue.prefix}w:{queue.lane}")) == 64


def test_only_the_newest_dead_jobs_are_kept(queue: Queue) -> None:
    dead, now_s = f"{queue.prefix}dead", queue.client.time()[0]
    queue.client.zadd(dead, {f"old{k}": (now_s - 2000 + k) * 1_000_000 for k in range(1000)})
    id = queue.add()
    for attempt in range(queue.limits["max_attempts"]):
        assert [claimed.id for claimed in queue.consumer(f"w{attempt}").claim(queue.lane, 1)] == [id]
        queue.let_leases_end()
        queue.reap()
    assert queue.state(id) == "failed"
    kept = queue.client.zrange(dead, 0, -1)
    assert len(kept) == 1000 and kept[-1] == id and "old0" not in kept
