"""The queue's scripts where something is missing, old or at a bound: exact values on a real server."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.queue.dead_letters import DeadLetterQueue
from service.queue.job import QueueOptions
from service.queue.producer import Producer
from service.queue.scripts import Scripts
from service.queue.status import Usage
from tests.service.queue.test_fairness import COST, set_pace
from tests.service.queue.test_patience import CLIENT, OPEN, crowded, leaves, stays
from tests.service.support import Queue

DAY_S = 86_400
WEEK_S = 7 * DAY_S
RESULT: dict[str, Any] = {"images": [], "runtime": "fake"}


def claim(queue: Queue, worker: str = "w") -> tuple[str, str]:
    [claimed] = queue.consumer(worker).claim({queue.lane: 1})
    return claimed.id, claimed.token


def lose(queue: Queue, id: str, times: int = 1) -> None:
    """Its worker falls silent, so often."""
    for _ in range(times):
        assert claim(queue)[0] == id
        queue.let_leases_end()
        queue.reap()


def age(queue: Queue, key: str, seconds: float) -> None:
    """What a hash says of a moment lies so much longer ago."""
    at_us = int(queue.client.hget(queue.prefix + key, "at_us") or 0)
    queue.client.hset(queue.prefix + key, "at_us", at_us - int(seconds * 1e6))


def test_a_dead_letter_is_listed_for_a_week(queue: Queue) -> None:
    now_s = time.time()
    moments_us = {name: (now_s - age_s) * 1e6 for name, age_s in (("old", WEEK_S + 60), ("young", WEEK_S - 60))}
    queue.client.zadd(f"{queue.prefix}dead", moments_us)
    lose(queue, id := queue.add(), times=3)
    assert queue.client.zrange(f"{queue.prefix}dead", 0, -1) == ["young", id]
    [letter] = queue.runner.run(DeadLetterQueue(queue.producer).newest(5))
    assert letter.died_s == pytest.approx(now_s, abs=30)
    error = {"code": "worker_lost", "message": "The worker died 3 times while it drew this."}
    assert queue.result(id)["error"] == error
    assert queue.client.hget(f"{queue.prefix}n", "dead") == "1"


def test_a_job_that_is_lost_twice_travels_alone_and_is_said_so_once(queue: Queue) -> None:
    lose(queue, id := queue.add(), times=2)
    assert queue.field(id, "bucket") == f"{queue.lane}|64x64|4|solo" and queue.field(id, "attempts") == "2"


def test_what_has_run_once_costs_its_quota_and_its_turn_whatever_becomes_of_it(
    make_queue: Callable[..., Queue],
) -> None:
    queue = make_queue(quota=10 * COST)
    lose(queue, id := queue.add(key="k"))
    assert queue.cancel(id) == "cancelled"
    assert queue.ask(queue.job(key="k")).quota_left == 8 * COST, "it was drawn for a while, and this"
    assert queue.client.zscore(f"{queue.prefix}f", "k") == 2 * COST


def test_a_quota_that_has_come_back_in_whole_is_not_written_down_again(make_queue: Callable[..., Queue]) -> None:
    """What is given back, or charged once more, after its hash has expired: without a moment it would never end."""
    queue = make_queue(quota=10 * COST)
    cancelled, going = queue.add(key="a"), queue.add(key="b")
    queue.client.delete(f"{queue.prefix}q:a", f"{queue.prefix}q:b")
    queue.cancel(cancelled)
    id, token = claim(queue)
    assert id == going
    queue.consumer("w").advance(id, token, RESULT, shape="64x64|2", images=1, cost=COST)
    assert not queue.client.exists(f"{queue.prefix}q:a", f"{queue.prefix}q:b")


def test_a_quota_never_holds_more_than_a_minutes_work(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST)
    queue.add(key="k")
    age(queue, "q:k", 600)
    assert queue.ask(queue.job(key="k")).quota_left == 9 * COST


def test_a_further_round_is_charged_and_its_debt_is_kept_a_minute_longer(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(quota=10 * COST)
    queue.add(key="k")
    id, token = claim(queue)
    queue.consumer("w").advance(id, token, RESULT, shape="64x64|2", images=1, cost=3 * COST)
    assert queue.client.hget(f"{queue.prefix}q:k", "left") == str(6 * COST)
    assert queue.field(id, "charged") == str(4 * COST)
    assert 110_000 < queue.client.pttl(f"{queue.prefix}q:k") <= 120_000


def test_usage_counts_a_job_once_and_each_of_its_rounds(queue: Queue) -> None:
    queue.add(key="k", seeds=(1, 2))
    id, token = claim(queue)
    queue.consumer("w").advance(id, token, RESULT, shape="64x64|2", images=1, cost=5)
    id, token = claim(queue)
    queue.consumer("w").finish(id, token, "done", RESULT)
    [used] = queue.runner.run(queue.producer.usage(1))
    assert used == Usage("k", used.day_s, jobs=1, images=3, work=2 * COST + 5)


def test_a_round_waits_from_the_moment_at_which_the_one_before_was_drawn(queue: Queue) -> None:
    id = queue.add()
    queue.client.hset(f"{queue.prefix}j:{id}", "created_us", int((time.time() - 50) * 1e6))
    [first] = queue.consumer("w").claim({queue.lane: 1})
    queue.consumer("w").advance(id, first.token, RESULT, shape="64x64|2", images=1, cost=5)
    [second] = queue.consumer("w").claim({queue.lane: 1})
    assert first.queue_s > 49 and second.queue_s < 40 and (first.best, second.best != "") == ("", True)


def test_the_priorities_at_both_ends_count_for_a_keys_share_of_the_queue(queue: Queue) -> None:
    queue.add(key="k", priority=-5), queue.add(key="k", priority=5)
    assert queue.enqueue(queue.job(key="k"), key_pending=2) == "key_full"
    assert queue.enqueue(queue.job(key="k"), key_pending=3) == "ok"


def test_a_higher_priority_overtakes_the_lowest_of_its_key(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(priority_images=1)
    low = [queue.add(key="k", priority=-5) for _ in range(20)]
    assert queue.draw(1) == low[:1]
    high = queue.add(key="k", priority=-4)
    assert queue.draw(1) == [high]


def test_a_record_that_is_gone_before_its_deadline_leaves_nothing_behind(queue: Queue) -> None:
    gone, kept = queue.add(key="k"), queue.add(key="k", height=128)
    queue.client.delete(f"{queue.prefix}j:{gone}")
    assert queue.cancel(gone) == "missing"
    for name, members in (("pending", [kept]), ("d", [kept]), ("b", [f"{queue.lane}|128x64|4"])):
        assert queue.client.zrange(queue.prefix + name, 0, -1) == members, name
    assert not queue.client.exists(f"{queue.prefix}p:{queue.lane}|64x64|4")
    queue.reap()
    assert queue.client.hgetall(f"{queue.prefix}kc") == {"k|0": "1"}
    assert queue.client.hgetall(f"{queue.prefix}wl") == {queue.lane: str(2 * COST)}
    assert queue.client.zrange(f"{queue.prefix}o", 0, -1) == [kept]


@pytest.mark.parametrize(("means", "pace"), [([9.0, 1.0, 2.0], 2.0), ([9.0, 1.0, 4.0, 2.0], 2.0), ([3.0], 3.0)])
def test_a_pace_is_the_lower_median_of_the_windows(queue: Queue, means: list[float], pace: float) -> None:
    said = {"jobs": 3, "work": 80, "busy": 8000, "means": [mean * 1e6 / COST for mean in means]}
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps(said))
    queue.add()
    place = queue.runner.run(queue.producer.position(queue.add()))
    assert place and place.wait_s == pytest.approx(pace, abs=0.002)


def test_before_the_first_window_is_full_the_pace_is_that_of_all_jobs(queue: Queue) -> None:
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps({"jobs": 2, "work": 2, "busy": 2e6, "means": []}))
    queue.add()
    place = queue.runner.run(queue.producer.position(queue.add()))
    assert place and place.wait_s == pytest.approx(COST, abs=0.002)


def test_the_workers_time_is_shared_by_all_lanes_and_what_came_before_fades(queue: Queue) -> None:
    """Of each lane three seconds' work came half a minute ago: 2 * 3 s / e, of the 30 s that are looked back on."""
    other = queue.job(version="2")
    for lane, us_per_cost in ((queue.lane, 1e6 / COST), (other.lane, 2e6 / COST)):
        set_pace(queue, us_per_cost, lane)
    for version, count in (("1", 6), ("2", 3)):
        for _ in range(count):
            queue.cancel(queue.add(version=version))
    ages = {f"{lane}@": int((time.time() - 30) * 1e6) for lane in (queue.lane, other.lane)}
    queue.client.hset(f"{queue.prefix}ar", mapping=ages)
    share, _ = queue.consumer("w").load("gone", 1)
    assert share == pytest.approx(12 / math.e / 30, rel=0.02)


def test_only_who_waited_as_long_as_others_that_left_has_stayed(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8)
    stays(queue, for_s=1.0, count=40)
    assert queue.client.hget(f"{queue.prefix}pt:anonymous", "stayed") == "0.000"
    stays(queue, for_s=3.0, count=2)
    assert float(str(queue.client.hget(f"{queue.prefix}pt:anonymous", "stayed"))) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("stayed", "word"), [(30, "left"), (34, "ok")])
def test_a_fifth_that_left_is_believed(queue: Queue, stayed: int, word: str) -> None:
    """Eight of 38 are more than a fifth, and eight of 42 are less."""
    leaves(queue, after_s=2.0, count=8)
    name = f"{queue.prefix}pt:anonymous"
    queue.client.hset(name, mapping={"left": 8, "stayed": stayed, "at_us": int(time.time() * 1e6)})
    crowded(queue)
    assert queue.ask(queue.job(), **OPEN).word == word


def test_a_key_that_was_idle_since_is_no_longer_kept_among_the_turns(queue: Queue) -> None:
    queue.add(key="idle"), queue.draw()
    for _ in range(3):
        queue.add(key="busy")
    queue.draw(3)
    queue.client.delete(f"{queue.prefix}kept")
    queue.reap()
    assert queue.client.zrange(f"{queue.prefix}f", 0, -1) == ["busy"]


def test_the_list_of_a_keys_jobs_is_kept_as_long_as_the_longest_of_them(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(ttl_s=10.0 * DAY_S, timeout_s=DAY_S)
    queue.add(key="k")
    assert queue.client.ttl(f"{queue.prefix}k:k") == pytest.approx(11 * DAY_S, abs=60)


def test_scores_are_waited_for_as_long_as_a_lease_and_while_their_worker_lives(queue: Queue) -> None:
    queue.add()
    id, token = claim(queue)
    worker = queue.consumer("w", lease_s=40.0)
    assert worker.finish(id, token, "done", RESULT, scores_follow=True) == "done"

    def left_s() -> float:
        return float(queue.client.zscore(f"{queue.prefix}sc", id) or 0) / 1e6 - time.time()

    assert 30 < left_s() <= 40 and WEEK_S - 60 < queue.client.ttl(f"{queue.prefix}sc") <= WEEK_S
    assert queue.consumer("w", lease_s=90.0).beat({}, [(id, token)]) == {} and 80 < left_s() <= 90
    assert not queue.client.zscore(f"{queue.prefix}l", id)


def test_nothing_is_left_of_a_worker_that_is_gone(queue: Queue) -> None:
    for name, go in (("a", lambda: queue.consumer("a").release([])), ("b", lambda: queue.consumer("v").lost("b"))):
        queue.add()
        worker = queue.consumer(name)
        worker.beat({"runtime": "fake"}, [])
        worker.claim({queue.lane: 1})
        go()
        kept = {
            key
            for key in ("wi", "wo", *("c" if name == "b" else ""))
            if queue.client.exists(queue.prefix + f"{key}:{name}")
        }
        assert kept == set() and not queue.client.zscore(f"{queue.prefix}wk", name)


def test_an_erased_dead_letter_is_listed_no_more(queue: Queue) -> None:
    lose(queue, id := queue.add(), times=3)
    assert queue.runner.run(queue.producer.erase(id)) == "erased"
    assert queue.client.zcard(f"{queue.prefix}dead") == 0


def test_a_client_that_waits_for_a_job_is_told_of_its_end_wherever_it_has_asked(queue: Queue) -> None:
    """Another process hears of each change once; the one that accepted the job hears of its end as an end alone."""
    there = Producer(queue.async_client, queue.model, "there", **queue.limits)
    same: dict[str, Any] = {"idempotency": "i", "body": "b"}
    job = queue.job()
    queue.enqueue(job, client=CLIENT, watched=True, **same)
    verdict = queue.runner.run(there.enqueue(queue.job(), QueueOptions(60.0, client="d", **same)))
    assert (verdict.word, verdict.id) == ("attached", job.id)
    queue.draw()
    heard = {
        api: [said["what"] for _, said in queue.client.xrange(f"{queue.prefix}r:{api}")] for api in ("api", "there")
    }
    assert heard == {"api": ["look", "end"], "there": ["look", "look"]}


def test_who_asks_without_a_connection_keeps_a_repeated_job_alive(queue: Queue) -> None:
    same = {"idempotency": "i", "body": "b"}
    job = queue.job()
    queue.enqueue(job, client=CLIENT, **same)
    assert queue.field(job.id, "detached") is None
    assert queue.enqueue(queue.job(), **same) == "attached"
    assert queue.leave(job.id, CLIENT) == "queued" and queue.field(job.id, "detached") == "1"


def test_a_batch_leaves_room_for_as_many_as_it_has_taken(queue: Queue) -> None:
    for key in ("k", "k", "other", "k", "k"):
        queue.add(key=key)
    assert len(queue.consumer("w").claim({queue.lane: 4})) == 4
    waits = queue.client.hgetall(f"{queue.prefix}kc")
    assert {name: count for name, count in waits.items() if count != "0"} == {"k|0": "1"}  # type: ignore[union-attr]
    assert queue.client.hgetall(f"{queue.prefix}wl") == {queue.lane: str(COST)}


def test_what_waits_behind_records_that_are_gone_is_claimed(queue: Queue) -> None:
    gone, *kept = (queue.add() for _ in range(3))
    queue.client.delete(f"{queue.prefix}j:{gone}")
    assert [claim(queue)[0] for _ in kept] == kept


def test_who_is_overtaken_by_its_own_key_stays_as_far_ahead_of_the_others(make_queue: Callable[..., Queue]) -> None:
    """A level of priority is worth three images: so far before its start each job of the key waits."""
    queue = make_queue(priority_images=3)
    first, second = queue.add(key="k", priority=1), queue.add(key="k", priority=-2)
    highest = queue.add(key="k", priority=2)
    found = {id: [int(queue.field(id, name) or 0) for name in ("start", "score")] for id in (first, second, highest)}
    assert found == {
        highest: [0, -6 * COST], first: [COST, COST - 3 * COST], second: [2 * COST, 2 * COST + 6 * COST],
    }  # fmt: skip
    assert [queue.client.zscore(f"{queue.prefix}o", id) for id in found] == [score for _, score in found.values()]


def test_the_virtual_time_never_goes_back(make_queue: Callable[..., Queue]) -> None:
    """A job with a bonus may be claimed after one that starts later: who comes next begins where the others are."""
    queue = make_queue(priority_images=2)
    for _ in range(4):
        queue.add(key="plain")
    queue.draw(4)
    queue.add(key="pushing", priority=5)
    queue.draw()
    assert int(str(queue.client.get(f"{queue.prefix}v"))) == 3 * COST
    assert queue.field(queue.add(key="late"), "start") == str(3 * COST)


def test_who_has_said_how_long_it_waits_teaches_nothing_of_the_others(queue: Queue) -> None:
    for options in ({"open_ended": False}, {"open_ended": True}):
        job = queue.job()
        queue.enqueue(job, client=CLIENT, **options)
        queue.leave(job.id, CLIENT)
        known = bool(queue.client.exists(f"{queue.prefix}pt:anonymous"))
        assert known is options["open_ended"]


def test_nothing_is_written_of_a_job_that_is_not_there(queue: Queue) -> None:
    """A record without a payload would never end, and everybody who reads it would stumble."""
    run, scripts = queue.runner.run, Scripts(queue.client, queue.model)
    run(queue.producer.watch("x"))
    assert run(queue.producer.detach("x", CLIENT)) == "missing" == queue.leave("x", CLIENT, grace_s=30.0)
    assert queue.cancel("x") == "missing" == run(queue.producer.erase("x"))
    assert run(queue.producer.position("x")) is None
    worker = queue.consumer("w")
    assert not worker.show("x", "1", {"0:0": "file"}) and not worker.progress("x", "1", 2)
    assert worker.finish("x", "1", "done", RESULT) == "fenced" == worker.score("x", "1", {})
    assert worker.advance("x", "1", RESULT, shape="64x64|2", images=1, cost=1) == "fenced"
    assert worker.hand_back([("x", "1")], spared=True) == 0 == worker.release([("x", "1")])
    for name, member in (("l", "x"), ("d", "x"), ("ab", "x"), ("sc", "x")):
        queue.client.zadd(queue.prefix + name, {member: 1})
    queue.reap()
    scripts.run("webhooks/postpone", "x", 1000, 1)
    assert scripts.run("feedback/note", "x", 0, "chosen", "", "{}", 9, 9, 9000) == "missing"
    assert scripts.run("drop_dead_letter", "x") == 0
    assert queue.leftovers() == set()
    kept = {str(key).removeprefix(queue.prefix) for key in queue.client.scan_iter(f"{queue.prefix}*")}
    assert kept <= {"n", "kept", "wk"}
