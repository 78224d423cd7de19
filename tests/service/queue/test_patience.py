"""Who has not said how long it waits is not queued for longer than others like it have waited of late."""

from __future__ import annotations

import time
from typing import Any

import pytest

from service.queue.job import Job, Verdict
from tests.service.queue.test_fairness import COST, set_pace
from tests.service.support import Queue

CLIENT = "c"
OPEN: dict[str, Any] = {"client": CLIENT, "open_ended": True, "timeout_s": 600.0}


def aged(queue: Queue, job: Job, age_s: float) -> None:
    """The job was accepted so long ago."""
    queue.client.hset(f"{queue.prefix}j:{job.id}", "created_us", round((time.time() - age_s) * 1e6))


def leaves(queue: Queue, after_s: float, count: int = 1, grace_s: float = 0.0, **changes: Any) -> None:
    """So many clients leave before their answer."""
    for _ in range(count):
        job = queue.job(**changes)
        assert queue.enqueue(job, **OPEN) == "ok"
        aged(queue, job, after_s)
        queue.leave(job.id, CLIENT, grace_s)


def stays(queue: Queue, for_s: float, count: int) -> None:
    """So many clients have their answer after so long."""
    for _ in range(count):
        job = queue.job()
        assert queue.enqueue(job, **OPEN) == "ok"
        aged(queue, job, for_s)
        queue.draw()


def crowded(queue: Queue, jobs: int = 4, key: str = "anonymous") -> None:
    """So many jobs of a key wait, each of which takes a second."""
    for _ in range(jobs):
        queue.add(key=key)
    set_pace(queue, 1e6 / COST)


def ask(queue: Queue, **options: Any) -> Verdict:
    """A job that is done after five seconds: four are before it."""
    return queue.ask(queue.job(), **{**OPEN, **options})


def test_a_request_that_takes_longer_than_others_waited_is_refused_and_leaves_nothing(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8)
    crowded(queue)
    verdict = ask(queue)
    assert verdict.word == "left"
    waits_s = [verdict.wait_s, *(ask(queue).wait_s for _ in range(5))]
    assert all(3.0 * 0.95 <= wait_s <= 2 * 3.0 * 1.05 for wait_s in waits_s), "when it would be done in time"
    assert len(set(waits_s)) > 1, "they do not all come back at once"
    assert not queue.client.exists(f"{queue.prefix}j:{verdict.id}")


def test_what_is_done_before_they_leave_is_accepted(queue: Queue) -> None:
    leaves(queue, after_s=6.0, count=8)
    crowded(queue)
    assert ask(queue).word == "ok"


@pytest.mark.parametrize("said", [{"open_ended": False}, {"client": "", "open_ended": False}])
def test_who_has_said_it_or_comes_back_for_it_is_accepted(queue: Queue, said: dict[str, Any]) -> None:
    leaves(queue, after_s=2.0, count=8)
    crowded(queue)
    assert ask(queue, **said).word == "ok"


def test_the_patience_of_one_key_is_no_other_keys(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8, key="hasty")
    for key, word in (("hasty", "left"), ("calm", "ok")):
        crowded(queue, key=key)
        assert queue.ask(queue.job(key=key), **OPEN).word == word


def test_a_few_that_leave_at_once_say_nothing_of_the_others(queue: Queue) -> None:
    """Somebody who closes a page after a moment, among many who wait for seconds."""
    set_pace(queue, 1.0)
    leaves(queue, after_s=0.05, count=6)
    stays(queue, for_s=3.0, count=30)
    crowded(queue)
    assert ask(queue).word == "ok"


def test_fewer_than_five_are_no_evidence(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=4)
    crowded(queue)
    assert ask(queue).word == "ok"


def test_a_client_that_may_come_back_has_not_left(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8, grace_s=30.0)
    crowded(queue)
    assert ask(queue).word == "ok"


@pytest.mark.parametrize(("after_s", "word"), [(6.0, "ok"), (4.0, "left")])
def test_one_of_six_that_leaves_at_once_does_not_speak_for_the_others(queue: Queue, after_s: float, word: str) -> None:
    leaves(queue, after_s=0.01)
    leaves(queue, after_s=after_s, count=5)
    crowded(queue)
    assert ask(queue).word == word


def test_a_quarter_that_leaves_early_is_enough(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=2)
    leaves(queue, after_s=6.0, count=6)
    crowded(queue)
    assert ask(queue).word == "left"


def test_who_comes_back_for_a_picture_has_not_waited_for_it(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8)
    for _ in range(40):
        job = queue.job()
        queue.enqueue(job, **OPEN)
        queue.runner.run(queue.producer.detach(job.id, CLIENT))
        aged(queue, job, 3.0)
        queue.draw()
    crowded(queue)
    assert ask(queue).word == "left"


def test_who_leaves_while_its_picture_is_drawn_has_left_once_and_has_not_stayed(queue: Queue) -> None:
    worker = queue.consumer("w")
    for _ in range(8):
        job = queue.job()
        assert queue.enqueue(job, **OPEN) == "ok"
        [claimed] = worker.claim({queue.lane: 1})
        aged(queue, job, 2.0)
        assert [queue.leave(job.id, CLIENT) for _ in range(2)] == ["running"] * 2, "the answer to the first was lost"
        aged(queue, job, 3.0)
        worker.finish(claimed.id, claimed.token, "done", {})
    known = queue.client.hgetall(f"{queue.prefix}pt:anonymous")
    assert float(known["left"]) == pytest.approx(8, rel=0.01) and float(known["stayed"]) == 0  # type: ignore[index]


def test_only_the_last_ones_count(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=20)
    leaves(queue, after_s=6.0, count=20)
    crowded(queue)
    assert ask(queue).word == "ok"


def test_it_is_forgotten(queue: Queue) -> None:
    leaves(queue, after_s=2.0, count=8)
    crowded(queue)
    known = f"{queue.prefix}pt:anonymous"
    assert 0 < queue.client.pttl(known) <= 600_000
    queue.client.hset(known, "at_us", round((time.time() - 60.0) * 1e6))  # 8 / e is less than five
    assert ask(queue).word == "ok"
