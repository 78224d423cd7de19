"""Scores that a worker hands in after the job: exactly once, by the worker that drew it, or lost and said so."""

from __future__ import annotations

from typing import Any

from service.queue.job import Claimed
from tests.service.support import Queue

RESULT: dict[str, Any] = {"images": [{"file": "f0", "reward": {}}, {"file": "f1", "reward": {}}], "runtime": "fake"}
SCORES: dict[str, Any] = {
    "images": [{"reward": {"trained": 0.5}, "reward_percentile": {"trained": 61.0}}, {"reward": {"trained": -1.0}}],
    "score_s": 0.25,
}


def drawn(queue: Queue, worker: str = "w") -> Claimed:
    """A job that is done and whose scores are awaited."""
    queue.add(seeds=(1, 2))
    [claimed] = queue.consumer(worker).claim({queue.lane: 8})
    assert queue.consumer(worker).finish(claimed.id, claimed.token, "done", RESULT, scores_follow=True) == "done"
    return claimed


def let_time_pass(queue: Queue) -> None:
    queue.let_deadlines_pass("sc")
    queue.reap()


def rewards(queue: Queue, id: str) -> list[dict[str, float]]:
    return [image["reward"] for image in queue.record(id).result["images"]]


def test_scores_come_into_the_record_of_a_job_that_is_done_exactly_once(queue: Queue) -> None:
    claimed, worker = drawn(queue), queue.consumer("w")
    before = queue.record(claimed.id)
    assert (before.state, before.scoring, before.terminal, before.settled) == ("done", "pending", True, False)
    assert rewards(queue, claimed.id) == [{}, {}] and queue.notices() == [claimed.id]
    assert [worker.score(claimed.id, claimed.token, SCORES) for _ in range(2)] == ["done", "done"]
    other = {"images": [{"reward": {"trained": 9.0}}] * 2, "score_s": 1.0}
    assert worker.score(claimed.id, claimed.token, other) == "done", "the first ones count"
    record = queue.record(claimed.id)
    assert (record.scoring, record.settled) == ("done", True)
    assert rewards(queue, claimed.id) == [{"trained": 0.5}, {"trained": -1.0}]
    assert record.result["images"][0]["reward_percentile"] == {"trained": 61.0}
    assert record.result["timings"]["score_s"] == 0.25 and record.result["images"][0]["file"] == "f0"
    assert queue.notices_of("score") == [claimed.id] and queue.notices() == [claimed.id]
    assert queue.leftovers() == set()


def test_another_claim_and_a_job_without_late_scores_are_fenced(queue: Queue) -> None:
    claimed, worker = drawn(queue), queue.consumer("w")
    assert worker.score(claimed.id, "1", SCORES) == "fenced"
    queue.add()
    [plain] = worker.claim({queue.lane: 8})
    assert worker.score(plain.id, plain.token, SCORES) == "fenced", "it still runs"
    assert worker.finish(plain.id, plain.token, "done", RESULT) == "done"
    assert worker.score(plain.id, plain.token, SCORES) == "fenced", "its scores came with it"
    assert worker.score("0" * 32, "1", SCORES) == "fenced", "there is no such job"
    assert rewards(queue, claimed.id) == [{}, {}] == rewards(queue, plain.id)
    assert queue.client.hget(f"{queue.prefix}n", "fenced") == "4"
    assert queue.client.exists(f"{queue.prefix}j:{'0' * 32}") == 0, "nothing is written of what is not there"


def test_scores_that_do_not_come_in_time_are_lost_and_what_comes_later_is_fenced(queue: Queue) -> None:
    claimed = drawn(queue)
    queue.reap()
    assert queue.record(claimed.id).scoring == "pending", "there is time left"
    let_time_pass(queue)
    let_time_pass(queue)
    record = queue.record(claimed.id)
    assert (record.state, record.scoring, record.settled) == ("done", "lost", True)
    assert queue.notices_of("score") == [claimed.id]
    assert queue.consumer("w").score(claimed.id, claimed.token, SCORES) == "fenced"
    assert rewards(queue, claimed.id) == [{}, {}] and queue.record(claimed.id).scoring == "lost"


def test_a_heartbeat_renews_the_time_and_only_that_of_its_own(queue: Queue) -> None:
    mine, other = drawn(queue), drawn(queue)
    queue.let_deadlines_pass("sc")
    assert queue.consumer("w").beat({}, [(mine.id, mine.token), (other.id, "1")]) == {other.id: "lost"}
    assert (queue.record(mine.id).scoring, queue.record(other.id).scoring) == ("pending", "lost")


def test_a_worker_that_leaves_or_dies_takes_its_scores_with_it_at_once(queue: Queue) -> None:
    left, died, kept = drawn(queue, "a"), drawn(queue, "b"), drawn(queue, "c")
    assert queue.consumer("a").release([(left.id, left.token)]) == 0
    assert queue.consumer("c").lost("b") == 0
    assert [queue.record(claimed.id).scoring for claimed in (left, died, kept)] == ["lost", "lost", "pending"]
    assert [queue.state(claimed.id) for claimed in (left, died, kept)] == ["done"] * 3


def test_a_job_that_was_given_up_awaits_no_scores(queue: Queue) -> None:
    id = queue.add()
    [claimed] = queue.consumer("w").claim({queue.lane: 8})
    queue.cancel(id)
    assert queue.consumer("w").finish(id, claimed.token, "done", RESULT, scores_follow=True) == "cancelled"
    assert queue.record(id).scoring == "" and queue.leftovers() == set()


def test_a_record_that_has_gone_leaves_nothing_behind(queue: Queue) -> None:
    claimed = drawn(queue)
    queue.client.delete(f"{queue.prefix}j:{claimed.id}")
    assert queue.consumer("w").score(claimed.id, claimed.token, SCORES) == "fenced"
    let_time_pass(queue)
    assert queue.leftovers() == set() and not queue.client.exists(f"{queue.prefix}j:{claimed.id}")


def test_scores_of_another_release_are_read_tolerantly(queue: Queue) -> None:
    for written in (
        "no json",
        '"x"',
        '{"images": 3}',
        '{"images": [7, {"reward": {"a": "b", "c": 1}}], "score_s": "x"}',
    ):
        claimed = drawn(queue)
        queue.client.hset(f"{queue.prefix}j:{claimed.id}", mapping={"scores": written, "scoring": "later yet"})
        record = queue.record(claimed.id)
        assert [image["file"] for image in record.result["images"]] == ["f0", "f1"] and record.settled
        assert rewards(queue, claimed.id) in ([{}, {}], [{}, {"c": 1}])
