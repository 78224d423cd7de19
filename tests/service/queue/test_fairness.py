"""Who comes next, who is refused, and what the queue predicts: closed forms on a real server.

Each job of the tests costs COST, unless it has more images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Literal

import pytest

from tests.service.support import Queue, a_job

COST = a_job().cost


def test_a_cost_is_in_thousands_of_pixel_steps() -> None:
    assert COST == 64 * 64 * 4 // 1000 == 16
    assert a_job(steps=1, seeds=(1, 2)).cost == 8 and a_job(steps=1, height=8, width=8).cost == 1


def test_keys_take_turns_whoever_was_first_and_however_much_one_wants(queue: Queue) -> None:
    hog = [queue.add(key="hog") for _ in range(6)]
    assert queue.draw(2) == hog[:2]
    late = [queue.add(key="late") for _ in range(3)]
    order = queue.draw(7)
    # The newcomer starts where the hog is now: one turn ahead, then side by side, and the rest is the hog's.
    assert order[0] == late[0]
    assert {*order[1:3]} == {hog[2], late[1]} and {*order[3:5]} == {hog[3], late[2]} and order[5:] == hog[4:]


def test_turns_are_by_cost_and_not_by_number(queue: Queue) -> None:
    large = [queue.add(key="large", seeds=(1, 2, 3, 4)) for _ in range(3)]
    small = [queue.add(key="small") for _ in range(9)]
    drawn = queue.draw(12)
    between = [drawn[: drawn.index(id)] for id in large]
    assert [sum(id in small for id in before) for before in between[1:]] in ([4, 8], [5, 9], [4, 9], [5, 8])


def test_a_key_that_was_idle_has_saved_up_nothing(queue: Queue) -> None:
    queue.add(key="a"), queue.add(key="b")
    queue.draw(2)
    busy = [queue.add(key="a") for _ in range(8)]
    queue.draw(4)
    idle = [queue.add(key="b") for _ in range(3)]
    drawn = queue.draw(7)
    assert [drawn.index(id) for id in idle] <= [1, 3, 5], "turns, from now on"
    assert drawn.index(busy[4]) <= 2, "and not all of what it missed at once"


def test_a_priority_goes_ahead_by_a_bounded_amount_of_work(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(priority_images=3)
    patient = queue.add(key="patient")
    pushing = [queue.add(key="pushing", priority=1) for _ in range(10)]
    drawn = queue.draw(11)
    assert drawn.index(patient) in (3, 4), "three images ahead, and a tie"
    assert [id for id in drawn if id != patient] == pushing


def test_inside_a_key_the_higher_priority_comes_first_and_each_in_the_order_of_arrival(
    make_queue: Callable[..., Queue],
) -> None:
    """However much of the key waits, and whatever its size: the bonus alone would not overtake so much."""
    queue = make_queue(priority_images=1)
    first = [queue.add(key="k", height=64 + 64 * (number % 2), seeds=(1, 2, 3, 4)) for number in range(20)]
    low, high = queue.add(key="k", priority=-1), [queue.add(key="k", priority=1) for _ in range(3)]
    second, highest = queue.add(key="k"), queue.add(key="k", priority=5)
    assert queue.draw(26) == [highest, *high, *first, second, low]


def test_priorities_multiply_no_share(make_queue: Callable[..., Queue]) -> None:
    """Sixty jobs of two keys each: one asks for all of them alike, the other spreads them over six priorities."""
    for priority_of in (lambda number: number // 10, lambda number: 5 - number // 10, lambda number: number % 6):
        queue = make_queue(priority_images=1)
        plain = set()
        for number in range(60):
            plain.add(queue.add(key="plain"))
            queue.add(key="spread", priority=priority_of(number))
        assert 25 <= sum(id in plain for id in queue.draw(60)) <= 35


def test_a_bonus_that_reaches_ahead_makes_nobody_wait_who_comes_later(make_queue: Callable[..., Queue]) -> None:
    """The virtual time follows what was drawn: a newcomer starts beside those who wait, not behind all of them."""
    queue = make_queue(priority_images=10)
    plain = [queue.add(key="plain") for _ in range(20)]
    for _ in range(10):
        queue.add(key="pushing", priority=1)
    queue.draw(10)  # nine or ten of the pushing one's, whose last starts nine turns later
    late = queue.add(key="late")
    drawn = queue.draw(21)
    assert drawn.index(late) <= 2 and {*plain} <= {*drawn} | {id for id in plain if queue.state(id) == "done"}


def test_cancelled_work_gives_its_turn_back(queue: Queue) -> None:
    for id in [queue.add(key="hasty") for _ in range(100)]:
        queue.cancel(id)
    for _ in range(60):
        queue.add(key="other")
    asked = queue.add(key="hasty")
    assert asked in queue.draw(2)


def test_work_that_ran_keeps_its_turn(queue: Queue) -> None:
    worker = queue.consumer("w")
    for _ in range(5):
        id = queue.add(key="k")
        [claimed] = worker.claim({queue.lane: 1})
        queue.cancel(id)
        worker.finish(id, claimed.token, "done", {})
    assert queue.client.zscore(f"{queue.prefix}f", "k") == 5 * COST


@pytest.mark.parametrize("why", ["cancelled", "expired"])
def test_a_quota_is_given_back_for_what_never_ran(
    make_queue: Callable[..., Queue], why: Literal["cancelled", "expired"]
) -> None:
    queue = make_queue(quota=4 * COST)
    id = queue.add(key="k", seeds=(1, 2, 3))
    queue.cancel(id, why)
    assert queue.ask(queue.job(key="k")).quota_left == 3 * COST


def test_a_quota_is_given_back_for_what_failed_and_not_for_what_was_drawn(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST)
    worker = queue.consumer("w")
    for state in ("failed", "done"):
        queue.add(key="k")
        [claimed] = worker.claim({queue.lane: 1})
        worker.finish(claimed.id, claimed.token, state, {"error": {}} if state == "failed" else {})
    running = queue.add(key="k")
    [claimed] = worker.claim({queue.lane: 1})
    queue.cancel(running)
    worker.finish(running, claimed.token, "done", {})
    assert queue.ask(queue.job(key="k")).quota_left == 7 * COST, "the done one, the cancelled one that ran, and this"


def test_who_is_given_up_between_two_rounds_has_paid_for_the_one_that_was_drawn(
    make_queue: Callable[..., Queue],
) -> None:
    queue = make_queue(quota=10 * COST)
    worker = queue.consumer("w")
    id = queue.add(key="k")
    [claimed] = worker.claim({queue.lane: 1})
    best = {"images": [], "runtime": "fake"}
    assert worker.advance(id, claimed.token, best, shape="64x64|8", images=1, cost=2 * COST) == "queued"
    assert queue.client.zscore(f"{queue.prefix}f", "k") == 3 * COST
    assert queue.cancel(id) == "done"
    assert queue.client.zscore(f"{queue.prefix}f", "k") == COST
    assert queue.ask(queue.job(key="k")).quota_left == 8 * COST, "the first round, and this"


def test_who_gave_up_while_a_round_was_drawn_pays_for_no_other(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST)
    worker = queue.consumer("w")
    id = queue.add(key="k")
    [claimed] = worker.claim({queue.lane: 1})
    assert queue.cancel(id) == "running"
    best = {"images": [], "runtime": "fake"}
    assert worker.advance(id, claimed.token, best, shape="64x64|8", images=1, cost=2 * COST) == "done"
    assert queue.client.zscore(f"{queue.prefix}f", "k") == COST and queue.record(id).short == "cancelled"
    assert queue.ask(queue.job(key="k")).quota_left == 8 * COST, "the first round, and this"


def test_a_round_is_late_where_it_would_end_after_the_deadline(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    worker = queue.consumer("w")
    id, others = queue.add(), [queue.add() for _ in range(3)]
    worker.claim({queue.lane: 1})
    assert worker.load(id, COST) == (0.0, False), "nothing is known"
    lane = {"means": [1e6], "jobs": 0, "work": 0, "busy": 0}  # a second a cost
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps(lane))
    left_s = queue.timeout_s
    assert worker.load(id, int(left_s) - 2)[1] is False and worker.load(id, int(left_s) + 1)[1] is True
    assert worker.load(others[2], int(left_s) - 2 * COST - 2)[1] is False, "two wait before it"
    assert worker.load(others[2], int(left_s) - 2 * COST + 2)[1] is True
    assert worker.load("f" * 32, 1)[1] is True, "a job that is gone needs no round"


def test_jobs_that_another_release_put_in_uncounted_are_counted_again(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    ids = [queue.add(key="k") for _ in range(3)]
    order, work, counts = (f"{queue.prefix}{name}" for name in ("o", "wl", "kc"))
    before = [queue.client.zrange(order, 0, -1), queue.client.hgetall(work), queue.client.hgetall(counts)]
    queue.client.zrem(order, ids[1])
    queue.client.delete(work, counts)
    queue.reap()
    assert [queue.client.zrange(order, 0, -1), queue.client.hgetall(work), queue.client.hgetall(counts)] == before


def test_a_key_cannot_fill_the_queue_for_others(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(max_pending=100)
    waiting = [queue.add(key="greedy") for _ in range(10)]
    assert queue.enqueue(queue.job(key="greedy"), key_pending=10) == "key_full"
    assert queue.enqueue(queue.job(key="other"), key_pending=10) == "ok"
    assert queue.enqueue(queue.job(key="greedy"), key_pending=0) == "ok", "no bound of its own"
    queue.cancel(waiting[0])
    assert queue.enqueue(queue.job(key="greedy", priority=3), key_pending=10) == "key_full", "of whatever priority"
    queue.draw(3)
    assert queue.enqueue(queue.job(key="greedy"), key_pending=10) == "ok"


def test_a_place_counts_what_comes_before(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    ids = [queue.add(height=height) for height in (64, 64, 128)]
    places = [queue.runner.run(queue.producer.position(id)) for id in ids]
    assert [place.position for place in places if place] == [0, 1, 2], "over all batch keys"
    queue.draw(1)
    assert queue.runner.run(queue.producer.position(ids[0])) is None
    later = queue.runner.run(queue.producer.position(ids[2]))
    assert later and later.position == 1


def set_pace(queue: Queue, us_per_cost: float, lane: str | None = None) -> None:
    """As if the jobs of a lane had taken so long of late."""
    said = {"jobs": 0, "work": 0, "busy": 0, "means": [us_per_cost]}
    queue.client.hset(f"{queue.prefix}rt", lane or queue.lane, json.dumps(said))


def test_a_full_queue_says_when_there_will_be_room(make_queue: Callable[..., Queue]) -> None:
    """For a tenth of its jobs, not for all of them; and not for everybody at the same moment."""
    queue = make_queue(max_pending=20)
    ids = [queue.add() for _ in range(20)]
    assert queue.ask(queue.job()).wait_s == 0, "nothing was measured yet"
    set_pace(queue, 250_000 / COST)
    found = {queue.ask(queue.job()).wait_s for _ in range(20)}
    assert len(found) > 10 and min(found) >= 0.5 and max(found) <= 1.0
    place = queue.runner.run(queue.producer.position(ids[4]))
    assert place and place.wait_s == pytest.approx(1.0)


def test_a_key_without_room_is_told_when_its_own_turns_will_have_made_some(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    for number in range(30):
        queue.add(key="greedy" if number < 20 else "other")
    set_pace(queue, 1e6 / COST)
    verdict = queue.ask(queue.job(key="greedy"), key_pending=20)
    assert verdict.word == "key_full" and 3.0 <= verdict.wait_s <= 6.0, "two of its own, and one of the other's"


def drain(queue: Queue, seconds: list[float], jobs_a_batch: int = 1) -> None:
    """One worker draws batches that take so long: the moments of its claims are moved into the past."""
    for took_s in seconds:
        for _ in range(jobs_a_batch):
            queue.add()
        batch = queue.consumer("w").claim({queue.lane: jobs_a_batch})
        queue.client.hdel(f"{queue.prefix}rt", "last_us")
        for claimed in batch:
            queue.client.hset(f"{queue.prefix}j:{claimed.id}", "claimed_us", round((time.time() - took_s) * 1e6))
            queue.consumer("w").finish(claimed.id, claimed.token, "done", {})


def predicted_s(queue: Queue, jobs: int) -> float:
    """How long so many jobs will take, as it is told to the one behind them."""
    ids = [queue.add() for _ in range(jobs + 1)]
    place = queue.runner.run(queue.producer.position(ids[-1]))
    for id in ids:
        queue.cancel(id)
    assert place
    return place.wait_s


@pytest.mark.parametrize("before", [0, 30])
def test_a_prediction_survives_one_outlier_wherever_it_comes(queue: Queue, before: int) -> None:
    drain(queue, [0.05] * before + [100.0] + [0.05] * 30)
    assert 0.8 < predicted_s(queue, 20) < 2.0


def test_a_prediction_follows_a_new_pace(queue: Queue) -> None:
    drain(queue, [0.05] * 80)
    drain(queue, [1.0] * 48)
    assert 15 < predicted_s(queue, 20) < 25


def test_batch_mates_share_the_time_of_their_call(queue: Queue) -> None:
    drain(queue, [0.8] * 12, jobs_a_batch=8)
    assert 1.8 < predicted_s(queue, 20) < 2.4


def test_each_lane_has_a_pace_of_its_own(queue: Queue) -> None:
    """A slow model ahead counts for what it is, and does not make the fast one slow."""
    slow = queue.job(version="slow", key="a")
    set_pace(queue, 50_000 / COST)
    set_pace(queue, 10e6 / COST, slow.lane)
    queue.add(key="a")
    place = queue.runner.run(queue.producer.position(queue.add(key="a")))
    assert place and place.wait_s == pytest.approx(0.05)
    assert queue.enqueue(slow) == "ok"
    place = queue.runner.run(queue.producer.position(queue.add(key="a")))
    assert place and place.position == 3 and place.wait_s == pytest.approx((10.0 + 3 * 0.05) * 3 / 4, abs=0.001)


def test_the_time_of_workers_side_by_side_passes_once(queue: Queue) -> None:
    """Two workers, one with two batch mates, all for four seconds: three jobs in four seconds."""
    for _ in range(3):
        queue.add()
    first, second = queue.consumer("a").claim({queue.lane: 2}), queue.consumer("b").claim({queue.lane: 2})
    for claimed in (*first, *second):
        queue.client.hset(f"{queue.prefix}j:{claimed.id}", "claimed_us", round((time.time() - 4.0) * 1e6))
    for claimed in (*first, *second):
        queue.consumer("w").finish(claimed.id, claimed.token, "done", {})
    said = json.loads(str(queue.client.hget(f"{queue.prefix}rt", queue.lane)))
    assert said["work"] == 3 * COST and 4e6 <= said["busy"] < 6e6


def keep_waiting(queue: Queue, factor: float, count: int) -> None:
    """So many jobs behind another one, each of which is done after ``factor`` times what was predicted: two seconds."""
    for _ in range(count):
        first, job = queue.job(), queue.job()
        queue.enqueue(first)
        queue.enqueue(job, timeout_s=600.0)
        claims = queue.consumer("w").claim({queue.lane: 2})
        queue.client.hset(f"{queue.prefix}j:{job.id}", "created_us", round((time.time() - factor * 2.0) * 1e6))
        for claimed in claims:
            queue.consumer("w").finish(claimed.id, claimed.token, "done", {})
        set_pace(queue, 1e6 / COST)


def test_a_deadline_that_predictions_have_missed_of_late_is_refused(make_queue: Callable[..., Queue]) -> None:
    """The prediction allows for its own error: nine jobs in ten keep to what it is taken for."""
    right, wrong = make_queue(), make_queue()
    for queue, factor in ((right, 0.9), (wrong, 1.5)):
        set_pace(queue, 1e6 / COST)
        keep_waiting(queue, factor, 40)
        queue.add()
    assert right.ask(right.job(), timeout_s=2.1).word == "ok"
    verdict = wrong.ask(wrong.job(), timeout_s=2.7)
    assert verdict.word == "late" and verdict.wait_s == pytest.approx(0.3, abs=0.15), "it takes half as long again"
    assert wrong.ask(wrong.job(), timeout_s=3.3).word == "ok"


def test_half_of_what_workers_hold_is_still_to_be_done(queue: Queue) -> None:
    for _ in range(4):
        queue.add()
    queue.consumer("w").claim({queue.lane: 2})
    set_pace(queue, 1e6 / COST)
    verdict = queue.ask(queue.job(), timeout_s=3.5)
    assert (verdict.word, verdict.wait_s) == ("late", 0.5), "two wait, two halves run, and itself"
    behind = queue.job()
    assert queue.ask(behind, timeout_s=4.5).word == "ok"
    assert (queue.field(behind.id, "expected_ms"), queue.field(behind.id, "ahead")) == ("4000", "2")
    between = queue.job(key="another")
    assert queue.ask(between, timeout_s=9.0).word == "ok"
    assert queue.field(between.id, "ahead") == "0", "three wait, and its turn is before theirs"


def test_one_job_that_takes_for_ever_closes_no_door(queue: Queue) -> None:
    set_pace(queue, 1e6 / COST)
    keep_waiting(queue, 100.0, 1)
    queue.add()
    assert queue.ask(queue.job(), timeout_s=2.2).word == "ok"


def test_a_job_that_would_wait_beyond_its_deadline_is_refused_and_leaves_nothing(queue: Queue) -> None:
    set_pace(queue, 1e6 / COST)
    assert queue.enqueue(queue.job(), timeout_s=0.5) == "ok", "nobody is before it, whatever the rate"
    assert queue.enqueue(queue.job(), timeout_s=2.0) == "ok", "one is before it, and itself takes the other second"
    refused = queue.job()
    verdict = queue.ask(refused, timeout_s=1.5)
    assert (verdict.word, verdict.wait_s) == ("late", 1.5)
    assert not queue.client.exists(f"{queue.prefix}j:{refused.id}")
    assert queue.enqueue(queue.job(key="another"), timeout_s=1.5) == "ok", "its turn comes sooner"
    assert queue.enqueue(queue.job(priority=1), timeout_s=1.5) == "ok", "and so does this one's"


def test_a_deadline_ends_a_waiting_job_without_a_worker(queue: Queue) -> None:
    late, other = queue.job(), queue.add()
    queue.enqueue(late, timeout_s=0.0)
    queue.reap()
    assert queue.state(late.id) == "expired" and queue.notices() == [late.id] and queue.state(other) == "queued"
    assert queue.draw(3) == [other] and queue.leftovers() == set()


def test_a_deadline_reaches_the_worker_that_draws_it(queue: Queue) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 1})
    queue.let_deadlines_pass()
    queue.reap()
    assert queue.state(id) == "running" and queue.record(id).giving_up
    assert worker.beat({}, [(id, claimed.token)]) == {id: "expired"}
    assert queue.cancel(id) == "running", "the first reason counts"
    assert worker.finish(id, claimed.token, "done", {}) == "expired" and queue.leftovers() == set()


def test_a_deadline_also_ends_a_job_whose_worker_is_lost(queue: Queue) -> None:
    id = queue.add()
    queue.consumer("w").claim({queue.lane: 1})
    queue.let_deadlines_pass()
    queue.let_leases_end()
    queue.reap()
    assert queue.state(id) == "expired" and queue.consumer("v").claim({queue.lane: 1}) == []


def test_a_quota_is_counted_in_work_for_each_key_and_fills_up_again(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=4 * COST)
    assert [queue.ask(queue.job(key="k", seeds=(1, 2, 3))).quota_left] == [COST]
    assert queue.ask(queue.job(key="k")).word == "ok"
    verdict = queue.ask(queue.job(key="k", seeds=(1, 2)))
    assert verdict.word == "quota" and 28 < verdict.wait_s <= 30, "half of a minute's work has to come back"
    assert queue.enqueue(queue.job(key="other")) == "ok"
    at_us = int(queue.client.hget(f"{queue.prefix}q:k", "at_us") or 0)
    queue.client.hset(f"{queue.prefix}q:k", "at_us", at_us - 30_000_000)
    assert [queue.enqueue(queue.job(key="k", seeds=(1, 2))), queue.enqueue(queue.job(key="k"))] == ["ok", "quota"]


def test_a_job_larger_than_the_quota_needs_all_of_it_and_leaves_a_debt(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=COST)
    assert queue.ask(queue.job(seeds=(1, 2, 3))).quota_left == -2 * COST
    verdict = queue.ask(queue.job())
    assert verdict.word == "quota" and 178 < verdict.wait_s <= 180


def test_a_repeated_call_costs_no_quota_and_no_turn(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST)
    job = queue.job()
    assert [queue.enqueue(job), queue.enqueue(job)] == ["ok", "known"]
    assert queue.ask(queue.job()).quota_left == 8 * COST
    assert queue.client.zscore(f"{queue.prefix}f", job.key) == 2 * COST


def test_what_was_refused_took_no_turn_and_no_quota(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST, max_pending=1)
    queue.add()
    assert queue.enqueue(queue.job()) == "full"
    assert queue.client.zscore(f"{queue.prefix}f", "anonymous") == COST
    assert int(queue.client.hget(f"{queue.prefix}q:anonymous", "left") or 0) == 9 * COST
