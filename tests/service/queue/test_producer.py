"""What an HTTP process reads of the queue, and what the processes of a queue share."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from service.queue import producer as module
from service.queue.job import QueueOptions, Record, Verdict
from service.queue.producer import Producer
from service.queue.result import UNREADABLE
from service.queue.states import State
from service.queue.status import Usage
from tests.service.support import Queue, a_job

DAY_S = 86_400


def another_process(queue: Queue, api: str) -> Producer:
    return Producer(queue.async_client, queue.model, api, **queue.limits)


def test_a_record_of_which_little_is_known(queue: Queue) -> None:
    queue.client.hset(f"{queue.prefix}j:x", "state", "queued")
    assert queue.record("x") == Record("x", State.QUEUED, {})
    assert queue.runner.run(queue.producer.records(["x", "y"])).keys() == {"x"}, "the other one does not exist"
    queue.client.hset(f"{queue.prefix}j:x", "state", "of a later release")
    assert queue.record("x").state is State.RUNNING, "so nobody takes it for ended"


def test_a_job_that_is_done_without_its_result_has_an_answer_that_cannot_be_read(queue: Queue) -> None:
    for state, error in (("done", {"error": UNREADABLE}), ("running", None), ("cancelled", None)):
        queue.client.hset(f"{queue.prefix}j:x", "state", state)
        result = queue.record("x").result
        assert ({name: result[name] for name in result if name == "error"} or None) == error
        assert not error or (result["images"], result["runtime"]) == ([], "")


def test_a_record_of_which_all_is_known(queue: Queue) -> None:
    payload = a_job().to_payload()
    row = {
        "state": "running", "key": "k", "payload": payload, "created_us": 1_500_000, "claimed_us": 2_500_000,
        "finished_us": 3_500_000, "previews": json.dumps({"1:0": "file", "steps": "3"}), "cancel": "expired",
        "short": "failed", "idem": "digest", "body": "b", "webhook": "{}", "scoring": "pending",
    }  # fmt: skip
    queue.client.hset(f"{queue.prefix}j:x", mapping=row)
    assert queue.record("x") == Record(
        "x", State.RUNNING, {}, "k", payload, 1.5, 2.5, 3.5, {"1:0": "file"}, 3, True, "failed", "digest", "b", "{}",
        "pending",
    )  # fmt: skip
    queue.client.hset(f"{queue.prefix}j:x", mapping={"state": "expired"})
    assert not queue.record("x").giving_up, "it has ended"
    queue.client.hdel(f"{queue.prefix}j:x", "scoring")
    queue.client.hset(f"{queue.prefix}j:x", "result", json.dumps({"images": [], "scoring": "skipped"}))
    assert queue.record("x").scoring == "skipped", "as the result says"


def test_failures_and_other_counts_add_up_under_their_names(queue: Queue) -> None:
    for _ in range(2):
        queue.runner.run(queue.producer.count_failures({"sweep": 2, "reap": 1}))
        queue.consumer("w").count({"probes": 3})
    assert queue.runner.run(queue.producer.depth()).counters == {"failed:sweep": 4, "failed:reap": 2, "probes": 6}


def test_a_secret_is_one_for_all_processes_and_kept_while_it_is_asked_for(queue: Queue) -> None:
    ours = queue.runner.run(queue.producer.shared_secret("links"))
    assert ours and len(ours) == 32 and ours == queue.runner.run(another_process(queue, "b").shared_secret("links"))
    assert ours != queue.runner.run(queue.producer.shared_secret("other"))
    name = f"{queue.prefix}secret:links"
    queue.client.expire(name, 60)
    assert queue.runner.run(queue.producer.shared_secret("links")) == ours
    assert 29 * DAY_S < queue.client.ttl(name) <= 30 * DAY_S


def test_one_process_does_a_duty_until_its_turn_is_over(queue: Queue) -> None:
    other = another_process(queue, "b")
    run = queue.runner.run
    assert [run(process.take_turn("sweep", 60.0)) for process in (queue.producer, other, queue.producer)] == [
        True, False, False,
    ]  # fmt: skip
    assert run(other.take_turn("ask", 60.0)), "another duty"
    assert 59_000 < queue.client.pttl(f"{queue.prefix}turn:sweep") <= 60_000
    queue.client.delete(f"{queue.prefix}turn:sweep")  # as if the time were over
    assert run(other.take_turn("sweep", 0.0)), "a turn has at least a millisecond"


def test_usage_is_that_of_the_last_days_and_of_today(queue: Queue) -> None:
    today = queue.client.time()[0] // DAY_S
    for day, jobs in ((today, 1), (today - 1, 2), (today - 2, 3)):
        queue.client.hset(f"{queue.prefix}u:{day}", mapping={"k|jobs": jobs, "k|images": 5, "k|work": 7})
    found = queue.runner.run(queue.producer.usage(2))
    assert found == [Usage("k", today * DAY_S, 1, 5, 7), Usage("k", (today - 1) * DAY_S, 2, 5, 7)]


def test_the_owners_are_the_keys_that_have_jobs(queue: Queue) -> None:
    assert queue.runner.run(queue.producer.owners()) == []
    queue.add(key="ann"), queue.add(key="b:o:b"), queue.add(key="ann")
    assert sorted(queue.runner.run(queue.producer.owners())) == ["ann", "b:o:b"]


def test_a_key_reads_its_jobs_in_both_orders_and_from_where_it_was(queue: Queue) -> None:
    ids = [queue.add(key="ann", priority=k % 2) for k in range(6)]
    created_us = {id: int(queue.field(id, "created_us") or 0) for id in ids}

    def owned(limit: int, **options: Any) -> list[int]:
        return [ids.index(record.id) for record in queue.runner.run(queue.producer.owned("ann", limit, **options))]

    assert (owned(9), owned(2)) == ([5, 4, 3, 2, 1, 0], [5, 4])
    assert (owned(9, oldest_first=True), owned(2, oldest_first=True)) == ([0, 1, 2, 3, 4, 5], [0, 1])
    assert owned(2, after_us=created_us[ids[3]]) == [2, 1], "those that come after it, and not itself"
    assert owned(2, after_us=created_us[ids[3]], oldest_first=True) == [4, 5]
    assert owned(2, wanted=lambda record: record.job.priority == 1) == [5, 3], "as many as are wanted, not as are read"


def test_clients_that_are_refused_together_do_not_come_back_together(
    make_queue: Callable[..., Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a quota is full at its own time, and a deadline is missed by as much as it is."""
    monkeypatch.setattr(module.random, "uniform", lambda low, high: (low, high) == (1.0, 2.0) and 1.5)
    queue = make_queue(max_pending=2, quota=20)
    queue.add(key="a"), queue.add(key="b")
    pace = {"jobs": 0, "work": 0, "busy": 0, "means": [1e6 / 16]}  # a second for each
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps(pace))
    assert queue.ask(queue.job(key="c")).wait_s == pytest.approx(1.5), "one place of two"
    assert (again := queue.ask(queue.job(key="a"))).word == "quota" and again.wait_s == pytest.approx(36, abs=1)
    queue.draw(2)
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps(pace))
    queue.add(key="c")
    shared = queue.ask(queue.job(key="c"), quota=0, key_pending=1)
    assert shared.word == "key_full" and shared.wait_s == pytest.approx(1.5)
    late = queue.ask(queue.job(key="c"), quota=0, timeout_s=0.5)
    assert late.word == "late" and late.wait_s == pytest.approx(1.5), "two seconds in place of a half"


def test_a_level_of_priority_is_worth_so_many_images_of_its_own_cost(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue()
    queue.producer = Producer(queue.async_client, queue.model, "api", **queue.limits, priority_images=3)
    for priority in (-5, 0, 2):
        id = queue.add(key=f"k{priority}", priority=priority, seeds=(1, 2))
        ahead = int(queue.field(id, "start") or 0) - int(queue.field(id, "score") or 0)
        assert ahead == priority * 3 * a_job().cost, "of one image"


def test_the_depth_is_what_waits_what_runs_and_how_long_the_oldest_has_waited(queue: Queue) -> None:
    run = queue.runner.run
    empty = run(queue.producer.depth())
    assert (empty.waiting, empty.running, empty.oldest_s, empty.workers, empty.counters) == (0, 0, 0.0, 0, {})
    oldest, _, _ = queue.add(), queue.add(), queue.add()
    queue.consumer("w").claim({queue.lane: 1})
    queue.consumer("w", lease_s=30).beat({}, [])
    queue.client.zadd(f"{queue.prefix}wk", {"gone": 1})
    second = queue.client.zrange(f"{queue.prefix}pending", 0, 0)[0]
    queue.client.zadd(f"{queue.prefix}pending", {second: (time.time() - 100) * 1e6})
    depth = run(queue.producer.depth())
    assert (depth.waiting, depth.running, depth.workers) == (2, 1, 1) and 99 < depth.oldest_s < 110
    assert oldest != second


def test_a_process_asks_for_all_notices_of_a_job_once(queue: Queue) -> None:
    id, run = queue.add(), queue.runner.run
    for _ in range(2):
        run(queue.producer.watch(id))
    run(another_process(queue, "b").watch(id))
    assert queue.field(id, "watchers") == "api b "


def test_the_load_is_what_arrives_and_what_waits_and_a_further_round_ends_in_time_or_not(
    make_queue: Callable[..., Queue],
) -> None:
    """Three jobs of a second each have just arrived: a tenth of the 30 s that are looked back on, and as much to do."""
    queue = make_queue(timeout_s=10.0)
    pace = {"jobs": 0, "work": 0, "busy": 0, "means": [1e6 / 16]}
    queue.client.hset(f"{queue.prefix}rt", queue.lane, json.dumps(pace))
    ids, worker = [queue.add() for _ in range(3)], queue.consumer("w")
    share, late = worker.load(ids[0], 16)
    assert share == pytest.approx(0.2, abs=0.01) and not late
    assert [worker.load(ids[0], cost)[1] for cost in (16 * 9, 16 * 11)] == [False, True]
    assert [worker.load(ids[2], cost)[1] for cost in (16 * 7, 16 * 9)] == [False, True], "two are before it"
    assert worker.load("gone", 16) == (pytest.approx(share, abs=0.01), True)


def told(
    monkeypatch: pytest.MonkeyPatch, *answer: Any, replicas: int = 0, copies: int = 0
) -> tuple[Producer, list[Any]]:
    """A producer whose queue gives this answer to a job, and what else it is asked for."""
    asked: list[Any] = []

    async def execute() -> list[Any]:
        return [list(answer), copies]

    async def run(name: str, *arguments: Any, pipeline: Any = None) -> Any:
        if name != "enqueue":
            asked.append((name, *arguments))
        return list(answer)

    pipeline = SimpleNamespace(execute=execute, wait=lambda *arguments: asked.append(("wait", *arguments)))
    client: Any = SimpleNamespace(pipeline=lambda transaction: pipeline)
    limits = {"ttl_s": 60.0, "max_pending": 9, "max_attempts": 3}
    monkeypatch.setattr(module, "Scripts", lambda *_: SimpleNamespace(prefix="p:", run=run))
    monkeypatch.setattr(module.random, "uniform", lambda low, high: {(1.0, 2.0): 1.5}[low, high])
    return Producer(client, "q", "api", replicas=replicas, **limits), asked  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "wait_s"),
    [
        ("ok", 8.0), ("known", 8.0), ("attached", 8.0), ("mismatch", 8.0), ("quota", 8.0), ("late", 8.0), ("gone", 8.0),
        ("full", 12.0), ("key_full", 12.0), ("left", 12.0),
    ],
)  # fmt: skip
def test_only_who_was_refused_for_others_sake_is_spread_over_time(
    word: str, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, _ = told(monkeypatch, word, "id", 8000, 7)
    verdict = asyncio.run(producer.enqueue(a_job(), QueueOptions(60.0, quota=11)))
    assert verdict == Verdict(word, "id", wait_s, 7, 11)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "copies", "accepted"),
    [("ok", 2, True), ("ok", 3, True), ("ok", 1, False), ("ok", 0, False), ("full", 0, True), ("known", 0, True)],
)
def test_a_job_is_accepted_when_enough_replicas_hold_it_and_else_taken_back(
    word: str, copies: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, asked = told(monkeypatch, word, "id", 0, 0, replicas=2, copies=copies)
    enqueued = producer.enqueue(a_job(), QueueOptions(60.0))
    if accepted:
        assert asyncio.run(enqueued).word == word and asked == [("wait", 2, 500)]
        return
    with pytest.raises(redis.ConnectionError, match=f"only {copies} of 2 replicas hold the job"):
        asyncio.run(enqueued)
    assert asked == [("wait", 2, 500), ("cancel", "id", "cancelled")]


def test_what_a_probe_has_measured_is_kept_for_a_year_and_more_after_it_was_last_asked_for(queue: Queue) -> None:
    worker, name = queue.consumer("w"), f"{queue.prefix}pr"
    assert worker.probe_record("a") is None and worker.probe_record("a", "first") == "first"
    assert worker.probe_record("a", "second") == "first", "the first one counts"
    queue.client.pexpire(name, 1000)
    assert worker.probe_record("b") is None and worker.probe_record("a") == "first"
    assert 399 * DAY_S < queue.client.ttl(name) <= 400 * DAY_S  # type: ignore[operator]


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([True, True, "ab" * 32], bytes.fromhex("ab" * 32)),
        ([None, True, "ab" * 32], bytes.fromhex("ab" * 32)),
        ([redis.OutOfMemoryError(), False, None], None),
        ([redis.OutOfMemoryError(), redis.OutOfMemoryError(), redis.ReadOnlyError("moved")], redis.ReadOnlyError),
    ],
)
def test_a_secret_that_cannot_be_made_now_is_none_and_one_that_is_there_is_read(answers: list[Any], found: Any) -> None:
    asked: list[tuple[Any, ...]] = []

    async def execute(raise_on_error: bool = True) -> list[Any]:
        assert not raise_on_error
        return answers

    pipeline = SimpleNamespace(
        execute=execute, set=lambda *_, nx: asked.append(("set", nx)), expire=lambda *_: None, get=lambda *_: None
    )
    client: Any = SimpleNamespace(pipeline=lambda transaction: pipeline)
    secret = Producer(client, "q", "api", ttl_s=60.0, max_pending=9, max_attempts=3).shared_secret("links")
    if isinstance(found, type):
        with pytest.raises(found):
            asyncio.run(secret)
    else:
        assert asyncio.run(secret) == found
    assert asked == [("set", True)], "never over that of another process"
