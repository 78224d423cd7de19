"""Nothing in the queue's server grows without end: notices, wake-ups and dead jobs are bounded in number."""

from __future__ import annotations

from collections.abc import Callable

from tests.service.support import Queue, a_job

DAY_S = 86_400
WEEK_S = 7 * DAY_S


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
        assert [claimed.id for claimed in queue.consumer(f"w{attempt}").claim({queue.lane: 1})] == [id]
        queue.let_leases_end()
        queue.reap()
    assert queue.state(id) == "failed"
    kept = queue.client.zrange(dead, 0, -1)
    assert len(kept) == 1000 and kept[-1] == id and "old0" not in kept


def test_each_key_is_kept_for_as_long_as_somebody_may_come_back_for_it(make_queue: Callable[..., Queue]) -> None:
    """Seconds; a minute of a quota comes back in a minute, and the debt of a job of three in three."""
    queue = make_queue(timeout_s=100.0, ttl_s=50.0, quota=10 * a_job().cost)
    asked = queue.job(key="k")
    assert queue.enqueue(asked, idempotency="digest", body="b") == "ok"
    worker = queue.consumer("w", lease_s=10.0)
    worker.beat({"runtime": "fake"}, [])
    [claimed] = worker.claim({queue.lane: 1})
    worker.finish(asked.id, claimed.token, "done", {"images": []})
    waiting = queue.add(key="debtor", seeds=tuple(range(30)))
    queue.reap()
    wanted = {
        "i:digest": 150, f"j:{waiting}": 150, f"j:{asked.id}": 50, f"w:{queue.lane}": 60, "r:api": 3600,
        "q:k": 60, "q:debtor": 180, "c:w": 600, "wi:w": 20, "wk": 40, "k:k": WEEK_S, "pending": WEEK_S, "o": WEEK_S,
        "b": WEEK_S, "d": WEEK_S, "wl": WEEK_S, "kc": WEEK_S, "f": WEEK_S, "v": WEEK_S, "token": WEEK_S, "rt": WEEK_S,
        "n": WEEK_S, f"u:{queue.client.time()[0] // DAY_S}": 400 * DAY_S,
    }  # fmt: skip
    kept = {name: queue.client.pttl(queue.prefix + name) / 1000 for name in wanted}
    assert {name: (kept[name], most) for name, most in wanted.items() if not most / 2 < kept[name] <= most} == {}
