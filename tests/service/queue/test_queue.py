"""The queue's transitions on a real server: nothing is lost, nothing ends twice, a dead worker changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError

from service.queue.connection import connect
from service.queue.job import Job
from service.queue.scripts import FOLDER, source
from service.supervise.redis_server import EmbeddedServer
from tests.service.support import Queue

WEEK_MS = 7 * 86_400_000
RESULT = {"images": [], "runtime": "fake"}


def test_a_job_goes_through_and_leaves_nothing_waiting(queue: Queue) -> None:
    job = queue.job(prompt="naïve ☃ prompt", seeds=(1, 2))
    assert queue.enqueue(job) == "ok"
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    assert Job.from_payload(claimed.payload) == job and claimed.attempts == 1 and 0 <= claimed.queue_s < 60
    assert queue.state(job.id) == "running"
    assert worker.finish(claimed.id, claimed.token, "done", RESULT) == "done"
    assert (queue.state(job.id), queue.result(job.id)) == ("done", RESULT)
    assert queue.notices() == [job.id] and queue.leftovers() == set()


def test_an_empty_queue_gives_nothing(queue: Queue) -> None:
    assert queue.consumer("w").claim({queue.lane: 8}) == []


def test_jobs_come_in_the_order_of_their_arrival(queue: Queue) -> None:
    ids = [queue.add() for _ in range(20)]
    worker = queue.consumer("w")
    assert [claimed.id for _ in range(3) for claimed in worker.claim({queue.lane: 8})] == ids


def test_a_batch_is_counted_in_images_and_never_jumps_the_queue(queue: Queue) -> None:
    sizes = [3, 4, 2, 1, 10, 1]
    ids = [queue.add(seeds=tuple(range(size))) for size in sizes]
    worker = queue.consumer("w")
    batches = [[ids.index(claimed.id) for claimed in worker.claim({queue.lane: 8})] for _ in range(5)]
    # 3 + 4 fit into 8, 2 more would not (and 1 may not overtake it); 10 is taken although it is too large, but alone.
    assert batches == [[0, 1], [2, 3], [4], [5], []]


def test_a_batch_is_as_large_as_is_asked_for_by_what_waits(queue: Queue) -> None:
    """By lane and shape, counted in images; never more than the lane allows, and a single job may be larger."""
    shape = queue.job().shape
    worker, small = queue.consumer("w"), {(queue.lane, shape): (1, 1, 2, 2, 3)}

    def batches(*images: int, most: int = 8, **changes: int) -> list[int]:
        for count in images:
            queue.add(seeds=tuple(range(count)), **changes)
        found = []
        while claimed := worker.claim({queue.lane: most}, sizes=small):
            found.append(sum(len(Job.from_payload(one.payload).seeds) for one in claimed))
        return found

    assert batches(1, 1, 1, 1, 1, 1, 1) == [3, 2, 1, 1], "7 wait: 3; 4 wait: 2; 2 wait: 1"
    assert batches(2, 2, 2) == [2, 2, 2], "6 images wait: 3, of which only one job of two fits"
    assert batches(1, 1, 1, 1, 1, most=2) == [2, 2, 1]
    assert batches(4, 1) == [4, 1]
    small[queue.lane, shape] = (1, 1, 1, 4)
    assert batches(2, 2) == [4], "4 images wait in two jobs"
    assert batches(1, 1, 1, steps=2) == [3], "another shape is batched as ever"


def test_sizes_hold_for_jobs_of_every_form_that_the_lane_reads(queue: Queue) -> None:
    video = queue.job(frames=9, fps=8)
    assert video.lane != queue.lane, "which a later release wrote"
    for _ in range(2):
        queue.add(frames=9, fps=8)
    worker = queue.consumer("w")
    assert [len(worker.claim({queue.lane: 8}, sizes={(queue.lane, video.shape): (1,)})) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("max_images", [0, -3])
def test_a_claim_of_nothing_is_a_claim_of_one(queue: Queue, max_images: int) -> None:
    for _ in range(3):
        queue.add()
    assert len(queue.consumer("w").claim({queue.lane: max_images})) == 1


def test_only_jobs_of_one_batch_key_share_a_batch_and_the_oldest_key_is_first(queue: Queue) -> None:
    small, large, steps, small2 = queue.add(), queue.add(height=128), queue.add(steps=2), queue.add(prompt="other")
    worker = queue.consumer("w")
    batches = [[claimed.id for claimed in worker.claim({queue.lane: 8})] for _ in range(4)]
    assert batches == [[small, small2], [large], [steps], []]


def test_a_worker_never_gets_a_job_of_another_version(queue: Queue) -> None:
    other = queue.job(version="2")
    queue.enqueue(other)
    assert queue.consumer("old").claim({queue.lane: 8}) == []
    assert queue.consumer("old").claim({"0" + queue.lane[1:]: 8}) == [], "nor one of another payload format"
    assert [claimed.id for claimed in queue.consumer("new").claim({other.lane: 8})] == [other.id]


def test_enqueueing_twice_is_enqueueing_once(queue: Queue) -> None:
    job = queue.job()
    assert [queue.enqueue(job), queue.enqueue(job)] == ["ok", "known"]
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    assert queue.enqueue(job) == "known" and queue.state(job.id) == "running"
    worker.finish(claimed.id, claimed.token, "done", RESULT)
    assert queue.enqueue(job) == "known" and worker.claim({queue.lane: 8}) == []


def test_a_repeated_claim_gets_the_same_jobs_and_no_more(queue: Queue) -> None:
    ids = [queue.add() for _ in range(5)]
    worker = queue.consumer("w")
    first = worker.claim({queue.lane: 2}, claim_id="c")
    again = worker.claim({queue.lane: 2}, claim_id="c")
    assert [claimed.id for claimed in first] == ids[:2]
    assert [(c.id, c.token, c.payload, c.attempts) for c in again] == [
        (c.id, c.token, c.payload, c.attempts) for c in first
    ]
    worker.finish(first[0].id, first[0].token, "done", RESULT)
    assert [claimed.id for claimed in worker.claim({queue.lane: 2}, claim_id="c")] == [ids[1]]
    assert [claimed.id for claimed in worker.claim({queue.lane: 2}, claim_id="d")] == ids[2:4]


def test_a_repeated_claim_gets_nothing_that_is_another_workers_by_now(queue: Queue) -> None:
    id = queue.add()
    slow, other = queue.consumer("slow"), queue.consumer("other")
    [claimed] = slow.claim({queue.lane: 1}, claim_id="c")
    slow.hand_back([(id, claimed.token)])
    assert [claimed.id for claimed in other.claim({queue.lane: 1})] == [id]
    assert slow.claim({queue.lane: 1}, claim_id="c") == []


def test_finishing_twice_is_finishing_once(queue: Queue) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    assert worker.finish(id, claimed.token, "done", RESULT) == "done"
    assert worker.finish(id, claimed.token, "failed", {"error": {}}) == "done", "the first word counts"
    assert queue.result(id) == RESULT and queue.notices() == [id]


def test_a_zombie_cannot_touch_a_job_that_was_given_to_another(queue: Queue) -> None:
    id = queue.add()
    zombie, heir = queue.consumer("zombie"), queue.consumer("heir")
    [old] = zombie.claim({queue.lane: 8})
    queue.let_leases_end()
    queue.reap()
    [new] = heir.claim({queue.lane: 8})
    assert new.id == id and new.token != old.token and new.attempts == 2
    assert zombie.beat({}, [(id, old.token)]) == {id: "lost"}
    assert zombie.finish(id, old.token, "done", {"who": "zombie"}) == "fenced"
    assert zombie.release([(id, old.token)]) == 0
    assert zombie.advance(id, old.token, RESULT, shape="64x64|2", images=1, cost=1) == "fenced"
    assert zombie.hand_back([(id, old.token)]) == 0
    assert queue.state(id) == "running" and queue.field(id, "worker") == "heir"
    assert heir.finish(id, new.token, "done", {"who": "heir"}) == "done"
    assert zombie.finish(id, old.token, "done", {"who": "zombie"}) == "fenced"
    assert queue.result(id) == {"who": "heir"} and queue.notices() == [id]


def test_a_job_on_devices_that_fail_is_spared_as_often_as_it_has_attempts(queue: Queue) -> None:
    """Then the attempts count after all: the job may be the reason."""
    id, worker, attempts = queue.add(), queue.consumer("w"), []
    for _ in range(7):
        if claims := worker.claim({queue.lane: 1}):
            attempts.append(claims[0].attempts)
            worker.hand_back([(id, claims[0].token)], spared=True)
    assert attempts == [1, 1, 1, 1, 2, 3] and queue.state(id) == "failed"


def test_a_fenced_worker_stays_fenced_while_its_job_waits(queue: Queue) -> None:
    id = queue.add()
    zombie = queue.consumer("zombie")
    [old] = zombie.claim({queue.lane: 8})
    queue.let_leases_end()
    assert queue.reap() == 1 and queue.state(id) == "queued"
    assert zombie.finish(id, old.token, "done", RESULT) == "fenced" and queue.state(id) == "queued"
    assert [claimed.id for claimed in queue.consumer("heir").claim({queue.lane: 8})] == [id]


def test_a_heartbeat_keeps_the_lease_and_silence_loses_it(queue: Queue) -> None:
    id = queue.add()
    worker, other = queue.consumer("w", lease_s=60), queue.consumer("o")
    [claimed] = worker.claim({queue.lane: 8})
    queue.let_leases_end()
    assert worker.beat({}, [(id, claimed.token)]) == {}
    assert queue.reap() == 0 and other.claim({queue.lane: 8}) == []
    queue.let_leases_end()
    assert queue.reap() == 1 and queue.state(id) == "queued"


def test_jobs_of_a_lost_worker_travel_alone_from_then_on(queue: Queue) -> None:
    lost = [queue.add() for _ in range(3)]
    queue.consumer("w").claim({queue.lane: 8})
    fresh = [queue.add() for _ in range(2)]
    queue.let_leases_end()
    heir = queue.consumer("heir")
    heir.beat({}, [])  # reaps, too
    batches = [[claimed.id for claimed in heir.claim({queue.lane: 8})] for _ in range(5)]
    assert batches == [[lost[0]], [lost[1]], [lost[2]], fresh, []], "older jobs first, each alone"


def test_a_job_that_kills_every_worker_is_given_up_and_its_mates_are_not(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(max_attempts=3)
    mate, poison = queue.add(), queue.add()
    executions = 0
    while batch := queue.consumer(f"w{executions}").claim({queue.lane: 8}):
        executions += 1
        assert executions < 10
        if poison in [claimed.id for claimed in batch]:
            queue.let_leases_end()  # the worker is dead
            queue.reap()
        else:
            [claimed] = batch
            queue.consumer("w").finish(mate, claimed.token, "done", RESULT)
    assert queue.state(mate) == "done"
    assert queue.state(poison) == "failed" and queue.result(poison)["error"]["code"] == "worker_lost"
    assert queue.field(poison, "attempts") == "3" and executions == 4
    assert sorted(queue.notices()) == sorted([mate, poison])
    assert queue.client.zrange(f"{queue.prefix}dead", 0, -1) == [poison]
    assert queue.client.pttl(f"{queue.prefix}j:{poison}") > 6 * 86_400_000, "for fewstep dlq"
    assert queue.leftovers() == set()


def test_a_worker_that_is_known_to_be_dead_is_robbed_at_once(queue: Queue) -> None:
    ids = {queue.add() for _ in range(3)}
    dead, other = queue.consumer("dead"), queue.consumer("other")
    dead.claim({queue.lane: 2})
    [kept] = other.claim({queue.lane: 8})
    dead.beat({"runtime": "fake", "host": "h", "max_batch": 8}, [])
    assert queue.consumer("supervisor").lost("dead") == 2
    assert [worker.id for worker in queue.runner.run(queue.producer.workers())] == []
    redone = {claimed.id for _ in range(2) for claimed in queue.consumer("heir").claim({queue.lane: 8})}
    assert redone == ids - {kept.id} and queue.state(kept.id) == "running"


def test_a_worker_that_leaves_hands_back_without_an_attempt_being_counted(queue: Queue) -> None:
    ids = [queue.add() for _ in range(2)]
    for round in range(5):  # more often than there are attempts
        worker = queue.consumer(f"w{round}")
        batch = worker.claim({queue.lane: 8})
        assert [claimed.id for claimed in batch] == ids, "together, at their old place"
        assert {claimed.attempts for claimed in batch} == {1}
        assert worker.release([(claimed.id, claimed.token) for claimed in batch]) == 2
    assert queue.state(ids[0]) == "queued"


def test_cancelling_a_waiting_job_ends_it_at_once(queue: Queue) -> None:
    id = queue.add()
    assert queue.cancel(id) == "cancelled" == queue.cancel(id)
    assert queue.consumer("w").claim({queue.lane: 8}) == []
    assert queue.notices() == [id] and queue.leftovers() == set()


def test_cancelling_a_running_job_reaches_its_worker_and_beats_its_result(queue: Queue) -> None:
    id, mate = queue.add(), queue.add()
    worker = queue.consumer("w")
    held = [(claimed.id, claimed.token) for claimed in worker.claim({queue.lane: 8})]
    assert queue.cancel(id) == "running"
    assert worker.beat({}, held) == {id: "cancelled"}
    token = held[0][1]
    assert worker.finish(id, token, "done", RESULT) == "cancelled" == worker.finish(id, token, "done", RESULT)
    assert worker.finish(mate, token, "done", RESULT) == "done"
    assert queue.cancel(mate) == "done", "a finished job stays finished"
    assert sorted(queue.notices()) == sorted([id, mate])


@pytest.mark.parametrize("how", ["reaped", "released", "robbed"])
def test_a_job_that_was_cancelled_while_it_ran_is_never_given_out_again(queue: Queue, how: str) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    assert queue.cancel(id) == "running"
    if how == "reaped":
        queue.let_leases_end()
        queue.reap()
    elif how == "released":
        worker.release([(id, claimed.token)])
    else:
        worker.lost("w")
    assert queue.consumer("heir").claim({queue.lane: 8}) == []
    assert queue.state(id) == "cancelled" and queue.notices() == [id] and queue.leftovers() == set()


def test_an_unknown_job_cannot_be_cancelled(queue: Queue) -> None:
    assert queue.cancel("0" * 32) == "missing"


def test_a_job_whose_deadline_has_passed_is_not_given_out(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(timeout_s=0.0)
    late = [queue.add() for _ in range(3)]
    assert queue.consumer("w").claim({queue.lane: 8}) == []
    assert {queue.state(id) for id in late} == {"expired"} and queue.notices() == late
    assert queue.leftovers() == set()


def test_not_even_when_more_have_passed_than_one_claim_looks_for(queue: Queue) -> None:
    """Their deadlines pass between the look and the claim, as it were: the job's own record decides."""
    late = [queue.add() for _ in range(3)]
    for id in late:
        queue.client.hset(f"{queue.prefix}j:{id}", "deadline_us", 1)
    assert queue.consumer("w").claim({queue.lane: 8}) == []
    assert {queue.state(id) for id in late} == {"expired"} and sorted(queue.notices()) == sorted(late)


def test_a_job_whose_record_has_expired_is_skipped(queue: Queue) -> None:
    forgotten, id = queue.add(), queue.add()
    queue.client.delete(f"{queue.prefix}j:{forgotten}")
    assert [claimed.id for claimed in queue.consumer("w").claim({queue.lane: 8})] == [id]


def test_the_queue_is_bounded_and_frees_itself(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(max_pending=2)
    kept = [queue.add(), queue.add()]
    refused = queue.job()
    assert queue.enqueue(refused) == "full"
    assert queue.enqueue(queue.job(id=kept[0])) == "known", "what was accepted stays accepted"
    assert queue.client.exists(f"{queue.prefix}j:{refused.id}") == 0
    queue.cancel(kept[0])
    assert queue.enqueue(refused) == "ok"


def test_a_waiting_worker_is_woken_by_a_job_and_not_by_old_news(queue: Queue) -> None:
    worker = queue.consumer("w")
    for _ in range(3):
        queue.add()
    worker.wait([queue.lane], 20)  # returns at once; the suite's own limits would notice otherwise
    worker.claim({queue.lane: 8})
    worker.claim({queue.lane: 8})
    assert queue.client.exists(f"{queue.prefix}w:{queue.lane}") == 0, "an empty queue leaves no token behind"


def test_every_key_is_in_one_slot_and_ends_by_itself(queue: Queue) -> None:
    done, gone = queue.add(), queue.add()
    worker = queue.consumer("w")
    worker.beat({"runtime": "fake", "host": "h", "max_batch": 8}, [])
    batch = worker.claim({queue.lane: 8})
    worker.finish(done, batch[0].token, "done", RESULT)
    queue.let_leases_end()
    queue.reap()
    queue.add()
    assert queue.state(gone) == "queued"
    queue.client.delete(f"{queue.prefix}kept")  # a minute later
    queue.reap()
    keys = list(queue.client.scan_iter(f"{queue.prefix}*", count=1000))
    assert len(keys) > 8 and queue.prefix.count("{") == 1
    assert [key for key in keys if queue.client.pttl(key) <= 0] == []


@pytest.mark.parametrize("how", ["reaped", "released"])
def test_a_job_that_comes_back_wakes_a_worker(queue: Queue, how: str) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 8})
    worker.claim({queue.lane: 8})
    assert queue.client.llen(f"{queue.prefix}w:{queue.lane}") == 0
    if how == "reaped":
        queue.let_leases_end()
        queue.reap()
    else:
        worker.release([(id, claimed.token)])
    assert queue.client.llen(f"{queue.prefix}w:{queue.lane}") == 1


def test_a_record_outlives_its_deadline_and_is_kept_for_the_result_ttl(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue(timeout_s=600.0, ttl_s=50.0)
    id = queue.add()
    assert 640_000 < queue.client.pttl(f"{queue.prefix}j:{id}") <= 650_000
    [claimed] = queue.consumer("w").claim({queue.lane: 8})
    queue.consumer("w").finish(id, claimed.token, "done", RESULT)
    assert 40_000 < queue.client.pttl(f"{queue.prefix}j:{id}") <= 50_000


def test_the_figures_of_the_queue(queue: Queue) -> None:
    ids = [queue.add() for _ in range(3)]
    worker = queue.consumer("w")
    worker.beat({"runtime": "fake", "host": "h", "max_batch": 8}, [])
    [first] = worker.claim({queue.lane: 1})
    worker.finish(ids[0], first.token, "done", RESULT)
    worker.claim({queue.lane: 1})
    worker.finish(ids[1], "0", "done", RESULT)
    depth = queue.runner.run(queue.producer.depth())
    assert (depth.waiting, depth.running, depth.workers) == (1, 1, 1) and 0 <= depth.oldest_s < 60
    assert depth.counters == {"finished": 1, "fenced": 1}
    queue.let_leases_end()
    queue.reap()
    assert queue.runner.run(queue.producer.depth()).counters["redelivered"] == 1


def test_a_worker_that_is_silent_for_two_leases_counts_no_more(queue: Queue) -> None:
    info = {"runtime": "fake", "host": "h", "max_batch": 8}
    queue.consumer("w").beat(info, [])
    [worker] = queue.runner.run(queue.producer.workers())
    assert (worker.id, worker.runtime, worker.host, worker.max_batch) == ("w", "fake", "h", 8)
    queue.client.zadd(f"{queue.prefix}wk", {"w": 1})
    assert queue.runner.run(queue.producer.workers()) == []
    queue.consumer("v").beat(info, [])
    queue.consumer("v").release([])
    assert queue.runner.run(queue.producer.workers()) == []


def test_a_server_without_memory_refuses_new_work_and_lets_the_rest_finish(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    try:
        queue = Queue(server.url, runner)
        ids = [queue.add() for _ in range(4)]
        worker = queue.consumer("w")
        first = worker.claim({queue.lane: 2})
        queue.client.config_set("maxmemory", "1b")
        with pytest.raises(OutOfMemoryError):
            queue.add()
        assert worker.finish(ids[0], first[0].token, "done", RESULT) == "done"
        assert worker.beat({}, [(ids[1], first[1].token)]) == {}
        assert worker.release([(ids[1], first[1].token)]) == 1
        assert queue.cancel(ids[3]) == "cancelled"
        assert [claimed.id for claimed in worker.claim({queue.lane: 8})] == ids[1:3]
        runner.run(queue.close())
    finally:
        server.stop()


def test_a_server_that_lost_its_scripts_is_given_them_again(tmp_path: Path, runner: asyncio.Runner) -> None:
    server = EmbeddedServer(tmp_path / "redis")
    server.start()
    try:
        queue = Queue(server.url, runner)
        id = queue.add()
        connect(server.url).script_flush()
        [claimed] = queue.consumer("w").claim({queue.lane: 8})
        connect(server.url).script_flush()
        assert queue.consumer("w").finish(id, claimed.token, "done", RESULT) == "done"
        runner.run(queue.close())
    finally:
        server.stop()


def test_every_script_is_used_and_says_what_it_may_do_without_memory() -> None:
    names = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.lua")} - {"_common"}
    assert names == {
        "enqueue", "claim", "beat", "finish", "release", "lost", "cancel", "reap", "detach",
        "leave", "watch", "position", "show", "drop_dead_letter", "advance", "hand_back", "load", "order", "score",
        "open_stream", "renew_streams", "erase",
        *(f"models/{name}" for name in ("idle", "init", "promote", "promote_first", "read", "transition", "unload")),
        *(f"models/canary_{name}" for name in ("start", "end")),
        *(f"feedback/{name}" for name in ("note", "erase")),
        *(f"webhooks/{name}" for name in ("complete", "postpone", "take")),
    }  # fmt: skip
    assert {name for name in names if "allow-oom" not in source(name).splitlines()[0]} == {"enqueue"}


def test_a_key_sees_its_own_jobs_newest_first_and_only_those_that_are_kept(queue: Queue) -> None:
    mine = [queue.add(key="me") for _ in range(4)]
    queue.add(key="you")
    queue.client.delete(f"{queue.prefix}j:{mine[2]}")  # its record has run out
    owned = queue.runner.run(queue.producer.owned("me", 2))
    assert [record.id for record in owned] == [mine[3], mine[1]]
    assert [record.id for record in queue.runner.run(queue.producer.owned("me", 9))] == [mine[3], mine[1], mine[0]]
    assert queue.runner.run(queue.producer.owned("nobody", 9)) == []
    assert 0 < queue.client.pttl(f"{queue.prefix}k:me") <= WEEK_MS


def test_the_list_of_a_keys_jobs_is_bounded(queue: Queue) -> None:
    entries = {f"{k:032x}": k for k in range(1000)}
    queue.client.zadd(f"{queue.prefix}k:me", entries)
    newest = queue.add(key="me")
    listed = queue.client.zrange(f"{queue.prefix}k:me", 0, -1)
    assert len(listed) == 1000 and listed[-1] == newest and listed[0] == f"{1:032x}"


def test_a_worker_waits_for_jobs_of_every_form_that_it_reads(queue: Queue) -> None:
    video = queue.job(frames=9, fps=8)
    assert queue.enqueue(video) == "ok"
    queue.consumer("w").wait([queue.lane], 0.1)
    assert queue.client.exists(f"{queue.prefix}w:{video.lane}") == 0, "it was woken: the token is gone"
