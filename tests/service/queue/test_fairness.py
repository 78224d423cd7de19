"""Who comes next, who is refused, and what the queue predicts: closed forms on a real server.

Each job of the tests costs COST, unless it has more images.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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


def test_a_priority_goes_ahead_of_ones_own_backlog_and_a_negative_one_behind_everything(queue: Queue) -> None:
    backlog = [queue.add(key="k") for _ in range(5)]
    low, high = queue.add(key="k", priority=-1), queue.add(key="k", priority=1)
    assert queue.draw(7) == [high, *backlog, low]


def test_a_place_counts_what_comes_before(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    ids = [queue.add(height=height) for height in (64, 64, 128)]
    places = [queue.runner.run(queue.producer.place(id)) for id in ids]
    assert [place.position for place in places if place] == [0, 1, 2], "over all batch keys"
    queue.draw(1)
    assert queue.runner.run(queue.producer.place(ids[0])) is None
    later = queue.runner.run(queue.producer.place(ids[2]))
    assert later and later.position == 1


def set_rate(queue: Queue, work: int, busy_s: float) -> None:
    queue.client.hset(f"{queue.prefix}rate", mapping={"work": work, "busy_us": round(busy_s * 1e6)})


def test_a_full_queue_says_when_it_will_have_been_worked_off(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(max_pending=10)
    ids = [queue.add() for _ in range(10)]
    assert queue.ask(queue.job()).wait_s == 0, "nothing was measured yet"
    set_rate(queue, work=10 * COST, busy_s=2.5)
    verdict = queue.ask(queue.job())
    assert (verdict.word, verdict.wait_s) == ("full", 2.5)
    place = queue.runner.run(queue.producer.place(ids[4]))
    assert place and place.wait_s == pytest.approx(1.0)


def finish_as_if_claimed(queue: Queue, worker: str, id: str, token: str, seconds_ago: float) -> None:
    queue.client.hset(f"{queue.prefix}j:{id}", "claimed_us", round((time.time() - seconds_ago) * 1e6))
    queue.consumer(worker).finish(id, token, "done", {})


def test_the_drain_rate_is_work_by_the_time_that_passed_once(queue: Queue) -> None:
    """Two workers side by side, one with two batch mates, all for four seconds: three jobs in four seconds."""
    ids = [queue.add() for _ in range(3)]
    first, second = queue.consumer("a").claim(queue.lane, 2), queue.consumer("b").claim(queue.lane, 2)
    for worker, batch in (("a", first), ("b", second)):
        for claimed in batch:
            finish_as_if_claimed(queue, worker, claimed.id, claimed.token, 4.0)
    rate = queue.client.hgetall(f"{queue.prefix}rate")
    assert int(rate["work"]) == len(ids) * COST
    assert 4e6 <= int(rate["busy_us"]) < 6e6


def test_the_drain_rate_forgets(queue: Queue) -> None:
    set_rate(queue, work=1_000_000, busy_s=30.0)
    queue.add()
    [claimed] = queue.consumer("w").claim(queue.lane, 1)
    finish_as_if_claimed(queue, "w", claimed.id, claimed.token, 2.0)
    rate = queue.client.hgetall(f"{queue.prefix}rate")
    assert int(rate["work"]) == (1_000_000 + COST) // 2 and 16e6 <= int(rate["busy_us"]) < 18e6


def test_a_job_that_would_wait_beyond_its_deadline_is_refused_and_leaves_nothing(queue: Queue) -> None:
    set_rate(queue, work=COST, busy_s=1.0)
    assert queue.enqueue(queue.job(), timeout_s=0.5) == "ok", "nobody is before it, whatever the rate"
    assert queue.enqueue(queue.job(), timeout_s=2.0) == "ok"
    refused = queue.job()
    verdict = queue.ask(refused, timeout_s=1.5)
    assert (verdict.word, verdict.wait_s) == ("late", 0.5)
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
    [claimed] = worker.claim(queue.lane, 1)
    queue.let_deadlines_pass()
    queue.reap()
    assert queue.state(id) == "running" and queue.record(id).giving_up
    assert worker.beat({}, [(id, claimed.token)]) == {id: "expired"}
    assert queue.cancel(id) == "running", "the first reason counts"
    assert worker.finish(id, claimed.token, "done", {}) == "expired" and queue.leftovers() == set()


def test_a_deadline_also_ends_a_job_whose_worker_is_lost(queue: Queue) -> None:
    id = queue.add()
    queue.consumer("w").claim(queue.lane, 1)
    queue.let_deadlines_pass()
    queue.let_leases_end()
    queue.reap()
    assert queue.state(id) == "expired" and queue.consumer("v").claim(queue.lane, 1) == []


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
    assert queue.client.zscore(f"{queue.prefix}f", job.flow) == 2 * COST


def test_what_was_refused_took_no_turn_and_no_quota(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST, max_pending=1)
    queue.add()
    assert queue.enqueue(queue.job()) == "full"
    assert queue.client.zscore(f"{queue.prefix}f", "0|anonymous") == COST
    assert int(queue.client.hget(f"{queue.prefix}q:anonymous", "left") or 0) == 9 * COST
