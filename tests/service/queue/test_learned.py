"""What the queue learns from its jobs, in closed form, and for how long it is kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.queue.status import WorkerState
from tests.service.support import Queue, a_job

DAY_S, COST = 86_400, 64 * 64 * 4 // 1000
WEEK_S = 7 * DAY_S
RESULT = {"images": [], "runtime": "fake"}


def finish(queue: Queue, id: str, notes: dict[str, Any] | None = None, **options: Any) -> None:
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 1})
    assert claimed.id == id and worker.finish(id, claimed.token, "done", RESULT, notes=notes, **options) == "done"


def pace(queue: Queue) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(str(queue.client.hget(f"{queue.prefix}rt", queue.lane)))
    return found


def test_a_window_ends_with_the_first_batch_after_eight_jobs_and_nine_windows_are_kept(queue: Queue) -> None:
    for _ in range(8):
        finish(queue, queue.add())
    known = pace(queue)
    assert (known["jobs"], known["work"], len(known["means"])) == (8, 8 * COST, 0)
    mean = known["busy"] / known["work"]
    finish(queue, queue.add())
    known = pace(queue)
    assert (known["jobs"], known["work"]) == (1, COST) and known["means"] == [pytest.approx(mean)]
    before = [float(k) for k in range(1, 10)]
    queue.client.hset(
        f"{queue.prefix}rt", queue.lane, json.dumps({"jobs": 8, "work": 80, "busy": 160, "means": before})
    )
    finish(queue, queue.add())
    assert pace(queue)["means"] == [*before[1:], 2.0], "the oldest is forgotten"


def test_a_batch_ends_a_window_as_a_whole(queue: Queue) -> None:
    ids = [queue.add() for _ in range(10)]
    worker = queue.consumer("w")
    for claimed in worker.claim({queue.lane: 10}):
        worker.finish(claimed.id, claimed.token, "done", RESULT)
    assert pace(queue)["jobs"] == len(ids) and not pace(queue)["means"]


def expect(queue: Queue, id: str, took_s: float, ahead: int = 1) -> None:
    """A job that was accepted so long ago, behind so many others, and was expected to take ten seconds."""
    created_us = int((time.time() - took_s) * 1e6)
    facts = {"expected_ms": 10_000, "created_us": created_us, "ahead": ahead}
    queue.client.hset(f"{queue.prefix}j:{id}", mapping=facts)


def set_factor(queue: Queue, factor: float) -> None:
    queue.client.hset(f"{queue.prefix}rt", "delay", factor)


def factor_of(queue: Queue) -> float:
    return float(str(queue.client.hget(f"{queue.prefix}rt", "delay")))


@pytest.mark.parametrize(
    ("took_s", "ahead", "factor", "after"),
    [
        (30.0, 1, 1.0, math.exp(0.045)),  # longer than the ten seconds that were expected
        (5.0, 1, 1.0, 1.0),  # and shorter: never below 1
        (5.0, 1, 2.0, 2 * math.exp(-0.005)),
        (15.0, 1, 2.0, 2 * math.exp(-0.005)),  # within twice of what was expected
        (30.0, 0, 2.0, 2 * math.exp(0.045)),
        (30.0, 10, 2.0, 2 * math.exp(0.045)),
        (30.0, 100, 2.0, 2 * math.exp(0.0045)),  # what it changes shows only after a hundred jobs
        (5.0, 100, 2.0, 2 * math.exp(-0.0005)),
        (99.0, 1, 3.99, 4.0),  # and never above 4
    ],
)
def test_predictions_are_stretched_until_nine_jobs_in_ten_keep_them(
    took_s: float, ahead: int, factor: float, after: float, queue: Queue
) -> None:
    id = queue.add()
    expect(queue, id, took_s, ahead)
    set_factor(queue, factor)
    finish(queue, id)
    assert factor_of(queue) == pytest.approx(after, abs=2e-4)


@pytest.mark.parametrize("running", [False, True], ids=["waiting", "running"])
@pytest.mark.parametrize(
    ("took_s", "after"),
    [
        (30.0, 2 * math.exp(0.045)),  # whoever gives up after thrice the time has seen a prediction fail
        (15.0, 2.0),  # it might have been right yet
    ],
)
def test_a_job_that_is_given_up_teaches_what_is_certain_by_then(
    took_s: float, after: float, running: bool, queue: Queue
) -> None:
    id = queue.add()
    claims = queue.consumer("w").claim({queue.lane: 1}) if running else []
    expect(queue, id, took_s)
    set_factor(queue, 2.0)
    queue.cancel(id, "expired")
    assert factor_of(queue) == pytest.approx(after, abs=2e-4)
    queue.cancel(id, "cancelled")
    for claimed in claims:
        queue.consumer("w").finish(claimed.id, claimed.token, "done", RESULT)
    assert factor_of(queue) == pytest.approx(after, abs=2e-4), "once"


def test_a_client_that_leaves_after_longer_than_was_predicted_teaches_that_too(queue: Queue) -> None:
    job = queue.job()
    queue.enqueue(job, client="c", open_ended=True)
    expect(queue, job.id, 30.0)
    set_factor(queue, 2.0)
    queue.leave(job.id, "c")
    assert factor_of(queue) == pytest.approx(2 * math.exp(0.045), abs=2e-4)


def test_a_job_of_which_nothing_was_expected_teaches_nothing(queue: Queue) -> None:
    finish(queue, queue.add())
    assert queue.client.hget(f"{queue.prefix}rt", "delay") is None


def test_what_arrives_adds_up_and_fades_by_a_factor_e_in_half_a_minute(queue: Queue) -> None:
    name = f"{queue.prefix}ar"
    queue.add(), queue.add(seeds=(1, 2))
    assert float(str(queue.client.hget(name, queue.lane))) == pytest.approx(3 * COST, rel=0.01)
    queue.client.hset(name, f"{queue.lane}@", int((time.time() - 30) * 1e6))
    queue.add()
    assert float(str(queue.client.hget(name, queue.lane))) == pytest.approx(3 * COST / math.e + COST, rel=0.01)


def test_usage_counts_what_was_drawn_by_key_and_day(queue: Queue) -> None:
    finish(queue, queue.add(key="ann", seeds=(1, 2)))
    finish(queue, queue.add(key="ann"))
    finish(queue, queue.add(key="bob", candidates=3))
    worker = queue.consumer("w")
    queue.add(key="bob")
    [claimed] = worker.claim({queue.lane: 1})
    worker.finish(claimed.id, claimed.token, "failed", {"error": {"code": "c", "message": "m"}})
    [day] = [key for key in queue.client.scan_iter(f"{queue.prefix}u:*")]
    assert queue.client.hgetall(day) == {
        "ann|jobs": "2", "ann|images": "3", "ann|work": str(3 * COST), "bob|jobs": "1", "bob|images": "3",
        "bob|work": str(3 * COST),
    }  # fmt: skip
    assert int(str(day).rpartition(":")[2]) == int(time.time() // DAY_S)


def test_what_is_learned_is_kept_for_as_long_as_it_is_worth_something(make_queue: Callable[..., Queue]) -> None:
    """Seconds, of each key that no other test looks at."""
    queue = make_queue(timeout_s=100.0, ttl_s=50.0)
    drift = {"drift": [{"key": "s", "score": 1.0, "low": 0.0}], "seen": "digest"}
    finish(queue, queue.add(), drift)
    canary = {"epoch": "e", "base": "1", "candidate": "2"}
    queue.client.hset(f"{queue.prefix}ca", "m", json.dumps(canary))
    finish(queue, queue.add(pair="m|e|p|base"), {"half": {"rewards": {}, "call_s": 1.0, "batch": 1}})
    asked = queue.job(key="k")
    queue.enqueue(asked, client="c", open_ended=True)
    queue.leave(asked.id, "c")
    hooked = queue.job()
    queue.enqueue(hooked, webhook="{}")
    queue.cancel(hooked.id)
    held, waits = queue.add(), queue.job()
    worker = queue.consumer("w", lease_s=10.0)
    worker.beat({"runtime": "fake"}, [(claimed.id, claimed.token) for claimed in worker.claim({queue.lane: 1})])
    queue.runner.run(queue.producer.order("w", WorkerState.PAUSED))
    queue.enqueue(waits, client="c")
    queue.leave(waits.id, "c", 30.0)
    queue.reap()
    wanted = {
        "dr": 4 * WEEK_S, "sp:digest": 600, "cp:e": 4 * WEEK_S, "pt:k": 600, "wh": WEEK_S, "wo:w": WEEK_S,
        "l": WEEK_S, "ab": WEEK_S, f"j:{hooked.id}": 7200, f"j:{held}": 150,
    }  # fmt: skip
    kept = {name: queue.client.pttl(queue.prefix + name) / 1000 for name in wanted}
    assert {name: (kept[name], most) for name, most in wanted.items() if not most * 0.9 < kept[name] <= most} == {}


def test_an_expired_job_that_runs_is_looked_at_again_in_five_seconds(queue: Queue) -> None:
    id = queue.add()
    queue.consumer("w").claim({queue.lane: 1})
    queue.let_deadlines_pass()
    queue.reap()
    left_s = float(queue.client.zscore(f"{queue.prefix}d", id) or 0) / 1e6 - time.time()
    assert queue.field(id, "cancel") == "expired" and queue.state(id) == "running" and 4 < left_s <= 5


def test_the_mean_of_a_drift_is_of_the_newest_thousand(queue: Queue) -> None:
    known = {"n": 5000, "mean": 1.0, "low": 0.5, "at_us": "0"}
    queue.client.hset(f"{queue.prefix}dr", "s", json.dumps(known))
    finish(queue, queue.add(), {"drift": [{"key": "s", "score": 3.0, "low": 1.0}], "seen": "x"})
    found = json.loads(str(queue.client.hget(f"{queue.prefix}dr", "s")))
    assert found["n"] == 5001
    assert (found["mean"], found["low"]) == (pytest.approx(1.0 + 2 / 1000), pytest.approx(0.5 + 0.5 / 1000))
    assert time.time() - int(found["at_us"]) / 1e6 < 60
    assert a_job().cost == COST
