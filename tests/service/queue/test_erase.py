"""Deleting a job before it expires: only one that has ended, and then as if it had expired."""

from __future__ import annotations

from service.queue.scripts import Scripts
from tests.service.queue.test_late_scores import SCORES, drawn
from tests.service.support import Queue

DONE = {"images": [], "runtime": "fake"}


def erase(queue: Queue, id: str) -> str:
    return queue.runner.run(queue.producer.erase(id))


def test_only_a_job_that_has_ended_is_erased(queue: Queue) -> None:
    id, worker = queue.add(), queue.consumer("w")
    assert erase(queue, id) == "queued" and queue.state(id) == "queued"
    [claimed] = worker.claim({queue.lane: 8})
    assert erase(queue, id) == "running" and queue.state(id) == "running"
    assert worker.finish(id, claimed.token, "done", DONE) == "done"
    assert [erase(queue, id), erase(queue, id)] == ["erased", "missing"]
    assert queue.runner.run(queue.producer.records([id])) == {} and queue.leftovers() == set()
    assert worker.finish(id, claimed.token, "done", DONE) == "fenced"
    assert queue.cancel(id) == "missing"


def test_a_job_whose_scores_are_awaited_is_not_erased(queue: Queue) -> None:
    claimed = drawn(queue)
    assert erase(queue, claimed.id) == "done" and queue.record(claimed.id).scoring == "pending"
    assert queue.consumer("w").score(claimed.id, claimed.token, SCORES) == "done"
    assert erase(queue, claimed.id) == "erased"


def test_an_erased_job_is_not_listed_and_its_idempotency_key_draws_anew(queue: Queue) -> None:
    kept, gone = queue.job(key="me"), queue.job(key="me")
    assert queue.enqueue(kept) == queue.enqueue(gone, idempotency="i", body="b") == "ok"
    assert queue.draw(2) == [kept.id, gone.id]
    assert queue.ask(queue.job(key="me"), idempotency="i", body="b").word == "attached"
    assert erase(queue, gone.id) == "erased"
    assert [record.id for record in queue.runner.run(queue.producer.owned("me", 9))] == [kept.id]
    assert not queue.client.zscore(f"{queue.prefix}k:me", gone.id)
    assert queue.ask(queue.job(key="me"), idempotency="i", body="other").word == "ok"


def test_a_webhook_that_is_still_to_be_sent_is_not(queue: Queue) -> None:
    job = queue.job()
    assert queue.enqueue(job, webhook="https://example.com") == "ok"
    assert queue.draw() == [job.id] and queue.client.zcard(f"{queue.prefix}wh") == 1
    assert erase(queue, job.id) == "erased"
    assert Scripts(queue.client, queue.model).run("webhooks/take", 10, 1000) == []


def test_jobs_are_listed_oldest_first_too(queue: Queue) -> None:
    ids = [queue.add(key="me", seeds=(k,)) for k in range(5)]
    run, owned = queue.runner.run, queue.producer.owned
    assert [record.id for record in run(owned("me", 3, oldest_first=True))] == ids[:3]
    after_us = round(queue.record(ids[1]).created_s * 1e6)
    assert [record.id for record in run(owned("me", 2, oldest_first=True, after_us=after_us))] == ids[2:4]
    assert [record.id for record in run(owned("me", 9, after_us=after_us))] == ids[:1]
    odd = run(owned("me", 1, oldest_first=True, wanted=lambda record: record.job.seeds == (3,)))
    assert [record.id for record in odd] == [ids[3]]
