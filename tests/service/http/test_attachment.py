"""Who waits for a job: clients that come twice, that go away, and that will ask later."""

from __future__ import annotations

import pytest

from tests.service.support import Queue

SAME = {"idempotency": "digest", "body": "body"}


def test_a_repeated_request_is_attached_to_the_job_of_the_first(queue: Queue) -> None:
    first, again = queue.job(seeds=(1,)), queue.job(seeds=(2,))
    assert queue.ask(first, client="a", **SAME).id == first.id
    verdict = queue.ask(again, client="b", **SAME)
    assert (verdict.word, verdict.id) == ("attached", first.id)
    assert queue.draw(2) == [first.id], "one execution"
    after = queue.ask(queue.job(), client="c", **SAME)
    assert (after.word, after.id) == ("attached", first.id), "a finished job still answers"
    assert queue.enqueue(queue.job(), client="d", idempotency="other", body="body") == "ok"


def test_the_same_key_for_another_body_is_a_mistake(queue: Queue) -> None:
    first = queue.job()
    queue.ask(first, client="a", **SAME)
    assert queue.ask(queue.job(), client="b", idempotency="digest", body="other").word == "mismatch"
    queue.draw(1)
    assert queue.ask(queue.job(), client="b", idempotency="digest", body="other").word == "mismatch"


@pytest.mark.parametrize("end", ["cancelled", "expired", "failed", "marked"])
def test_what_ended_without_a_picture_is_tried_anew(queue: Queue, end: str) -> None:
    first, again = queue.job(), queue.job()
    queue.ask(first, client="a", **SAME)
    if end == "cancelled":
        queue.cancel(first.id)
    elif end == "expired":
        queue.let_deadlines_pass()
        queue.reap()
    else:
        [claimed] = queue.consumer("w").claim({queue.lane: 1})
        if end == "failed":
            queue.consumer("w").finish(first.id, claimed.token, "failed", {"error": {}})
        else:
            queue.cancel(first.id)
    verdict = queue.ask(again, client="b", **SAME)
    assert (verdict.word, verdict.id) == ("ok", again.id)
    assert queue.ask(queue.job(), client="c", **SAME).id == again.id


def test_a_job_is_given_up_when_its_last_client_has_gone(queue: Queue) -> None:
    job = queue.job()
    queue.ask(job, client="a", **SAME)
    queue.ask(queue.job(), client="b", **SAME)
    assert queue.leave(job.id, "a") == "queued" == queue.leave(job.id, "a"), "however often it is told"
    assert queue.leave(job.id, "b") == "cancelled"
    assert queue.leave(job.id, "b") == "cancelled" and queue.notices() == [job.id] and queue.leftovers() == set()


def test_a_running_job_is_given_up_at_its_next_step(queue: Queue) -> None:
    job = queue.job()
    queue.ask(job, client="a")
    [claimed] = queue.consumer("w").claim({queue.lane: 1})
    assert queue.leave(job.id, "a") == "running"
    assert queue.consumer("w").beat({}, [(job.id, claimed.token)]) == {job.id: "cancelled"}


def test_a_retry_in_time_finds_its_job_and_one_that_is_late_a_new_one(queue: Queue) -> None:
    job = queue.job()
    queue.ask(job, client="a", **SAME)
    assert queue.leave(job.id, "a", grace_s=30) == "queued"
    queue.reap()
    assert queue.ask(queue.job(), client="b", **SAME).id == job.id
    queue.let_deadlines_pass("ab")
    queue.reap()
    assert queue.state(job.id) == "queued", "somebody waits again"
    queue.leave(job.id, "b", grace_s=30)
    queue.let_deadlines_pass("ab")
    queue.reap()
    assert queue.state(job.id) == "cancelled"
    assert queue.ask(queue.job(), client="c", **SAME).word == "ok"


def test_a_job_that_is_asked_for_later_is_given_up_for_nobodys_absence(queue: Queue) -> None:
    asynchronous, detached = queue.job(), queue.job()
    queue.ask(asynchronous, **SAME)
    queue.ask(queue.job(), client="a", **SAME)
    assert queue.leave(asynchronous.id, "a") == "queued"
    queue.ask(detached, client="b")
    assert queue.runner.run(queue.producer.detach(detached.id, "b")) == "queued"
    assert queue.runner.run(queue.producer.detach("0" * 32, "b")) == "missing"
    assert queue.leave(detached.id, "b") == "queued"


def test_leaving_changes_nothing_about_what_has_ended(queue: Queue) -> None:
    job = queue.job()
    queue.ask(job, client="a")
    queue.draw(1)
    assert queue.leave(job.id, "a") == "done" == queue.leave(job.id, "a", grace_s=30)
    assert queue.leave("0" * 32, "a") == "missing" and queue.leftovers() == set()


def test_whoever_watches_hears_of_every_change_and_whoever_accepted_of_the_end_once(queue: Queue) -> None:
    job = queue.job()
    queue.ask(job, client="a", watched=True)
    for _ in range(2):
        queue.runner.run(queue.producer.watch(job.id))
    worker = queue.consumer("w")
    [claimed] = worker.claim({queue.lane: 1})
    assert worker.show(job.id, claimed.token, {"0:0": "one", "0:1": "two"})
    assert worker.show(job.id, claimed.token, {"0:1": "zwei", "1:0": "three"})
    assert not worker.show(job.id, "0", {"2:0": "a zombie's"})
    worker.finish(job.id, claimed.token, "done", {})
    report = [fields["what"] for _, fields in queue.client.xrange(f"{queue.prefix}r:api")]
    assert report == ["look", "look", "look", "end"]
    assert queue.record(job.id).previews == {"0:0": "one", "0:1": "zwei", "1:0": "three"}
