"""What a job's end counts: once, under the fence, and for nobody who did not ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from service.quality.drift import CAP, factors, observe, read_stream, step, threshold
from service.quality.feedback import DAY_MS, FeedbackPolicy, prompt_digest
from service.worker.notes import Timing, means, notes_of
from service.worker.scoring import Judged
from student.bundle import RewardReference
from student.runtimes.fake import fake_student
from tests.service.support import Queue, a_job

REFERENCE = RewardReference(0.0, 1.0, {"5": -1.0, "50": 0.0, "95": 1.0}, count=1000)
STUDENT = replace(fake_student(), reward_reference={"trained": REFERENCE, "heldout": REFERENCE})
POLICY = FeedbackPolicy(percentile=20.0, most=20, days=1.0)
TIMING = Timing(0.5, 2)


def judged(score: float, percentile: float = 50.0, heldout: float = 0.0) -> Judged:
    return Judged({"trained": score, "heldout": heldout}, {"trained": percentile, "heldout": 1.0})


def test_a_job_is_one_observation_of_each_scorer() -> None:
    notes = notes_of(STUDENT, a_job(), [judged(-2.0), judged(1.0)], TIMING, POLICY)
    rows = {row["key"]: row for row in notes["drift"]}
    row = rows["fake/1|4|64x64|trained|raw"]
    seen = observe(REFERENCE, [-2.0, 1.0])
    assert seen and (row["score"], row["low"]) == (-0.5, 0.5) and row["by"] == factors(REFERENCE, seen)
    assert (row["limit"], row["cap"]) == (threshold(2), CAP * threshold(2)) and len(rows) == 2
    assert set(notes) == {"drift", "seen"}


def test_selected_pictures_and_those_without_a_reference_of_their_own_are_counted_and_not_tested() -> None:
    selected = notes_of(STUDENT, a_job(candidates=4, rank_by="trained"), [judged(1.0)], TIMING, POLICY)["drift"]
    assert all("by" not in row and row["key"].endswith("|selected") for row in selected)
    other_steps = notes_of(STUDENT, a_job(steps=2), [judged(1.0)], TIMING, POLICY)["drift"]
    assert all("by" not in row and "|2|" in row["key"] for row in other_steps)


def test_a_scorer_that_failed_on_a_picture_says_nothing_of_its_job() -> None:
    assert means([judged(1.0), Judged({"heldout": 3.0})]) == {"heldout": 1.5}
    assert notes_of(STUDENT, a_job(), [Judged()], TIMING, POLICY) == {}


def test_half_of_a_pair_is_no_traffic() -> None:
    job = a_job(pair="m|e|p|base", may_train=True)
    notes = notes_of(STUDENT, job, [judged(-2.0, 1.0), judged(1.0, 1.0)], TIMING, POLICY)
    assert notes == {"half": {"rewards": {"heldout": 0.0, "trained": -0.5}, "call_s": 0.5, "batch": 2}}


def test_a_prompt_trains_only_with_consent_and_only_if_its_pictures_rank_low_by_a_trained_scorer() -> None:
    def low(**changes: Any) -> Any:
        rank = changes.pop("rank", 10.0)
        job = a_job(**{"may_train": True, "user": "ann", "metadata": {"page": "1"}, "key": "k", **changes})
        return notes_of(STUDENT, job, [judged(0.0, rank), judged(0.0, 15.0)], TIMING, POLICY).get("low")

    assert low(may_train=False) is None and low(rank=26.0) is None
    found = low(prompt="A  red\theart")
    assert found["entry"] == {
        "prompt": "A  red\theart", "percentile": 12.5, "count": 1, "model": "fake", "version": "1", "steps": 4,
    }  # fmt: skip
    assert found["digest"] == prompt_digest("a red heart") != prompt_digest("a red hearth")
    assert (found["most"], found["most_per_key"], found["kept_ms"]) == (20, 2, DAY_MS)
    for text in ("ann", "page", "1"):
        assert text not in json.dumps({name: value for name, value in found.items() if name != "entry"}).split('"')


def finish(queue: Queue, notes: dict[str, Any], **changes: Any) -> tuple[str, str]:
    """A job that a worker ends with these notes; returns its id and token."""
    id = queue.add(**changes)
    worker = queue.consumer("w")
    (claimed,) = worker.claim({queue.lane: 1})
    assert worker.finish(id, claimed.token, "done", {"images": []}, notes=notes) == "done"
    return id, claimed.token


def hash_of(queue: Queue, name: str) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in queue.client.hgetall(f"{queue.prefix}{name}").items()}  # type: ignore[union-attr]


def test_the_server_keeps_the_same_sums_as_the_closed_form(queue: Queue) -> None:
    scores, e = [-2.0, 0.5, -1.5], list[float]()
    for k, score in enumerate(scores):
        seen = observe(REFERENCE, [score])
        assert seen
        by = factors(REFERENCE, seen)
        row = {"key": "m/1|4|64x64|s|raw", "score": score, "low": seen.low, "by": by, "limit": 10.0, "cap": 100.0}
        finish(queue, {"drift": [row], "seen": f"p{k}"})
        e = step(e, by, 100.0)
    state = hash_of(queue, "dr")["m/1|4|64x64|s|raw"]
    found = read_stream("m/1|4|64x64|s|raw", state)
    assert (found.count, found.mean, found.low_share) == (3, pytest.approx(-1.0), pytest.approx(2 / 3))
    assert state["e"] == pytest.approx(e) and found.evidence == pytest.approx(sum(e) / len(e) / 10.0)


def test_a_prompt_that_comes_again_at_once_is_no_further_evidence(queue: Queue) -> None:
    row = {"key": "m/1|4|64x64|s|raw", "score": 1.0, "low": 0.0, "by": [2.0], "limit": 10.0, "cap": 100.0}
    for _ in range(3):
        finish(queue, {"drift": [row], "seen": "same"})
    assert hash_of(queue, "dr")["m/1|4|64x64|s|raw"]["e"] == [2]


def test_a_call_that_is_repeated_or_fenced_counts_nothing(queue: Queue) -> None:
    row = {"key": "m/1|4|64x64|s|raw", "score": 1.0, "low": 0.0}
    notes = {"drift": [row], "seen": "p"}
    id, token = finish(queue, notes)
    worker = queue.consumer("w")
    assert worker.finish(id, token, "done", {"images": []}, notes=notes) == "done"
    assert worker.finish(id, "0", "done", {"images": []}, notes=notes) == "fenced"
    assert hash_of(queue, "dr")["m/1|4|64x64|s|raw"]["n"] == 1


def test_scores_that_come_later_are_counted_once_with_them(queue: Queue) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    (claimed,) = worker.claim({queue.lane: 1})
    worker.finish(id, claimed.token, "done", {"images": []}, scores_follow=True)
    notes = {"drift": [{"key": "m/1|4|64x64|s|raw", "score": 1.0, "low": 0.0}], "seen": "p"}
    assert hash_of(queue, "dr") == {}
    assert [worker.score(id, token, {"images": []}, notes) for token in (claimed.token, claimed.token, "0")] == [
        "done", "done", "fenced",
    ]  # fmt: skip
    assert hash_of(queue, "dr")["m/1|4|64x64|s|raw"]["n"] == 1


def test_what_was_cancelled_meanwhile_counts_nothing(queue: Queue) -> None:
    id = queue.add()
    worker = queue.consumer("w")
    (claimed,) = worker.claim({queue.lane: 1})
    queue.cancel(id)
    row = {"key": "m/1|4|64x64|s|raw", "score": 1.0, "low": 0.0}
    assert worker.finish(id, claimed.token, "done", {"images": []}, notes={"drift": [row], "seen": "p"}) == "cancelled"
    assert hash_of(queue, "dr") == {}


@pytest.fixture
def low() -> Callable[..., dict[str, Any]]:
    def make(prompt: str, percentile: float = 10.0, **limits: Any) -> dict[str, Any]:
        entry = {"prompt": prompt, "percentile": percentile, "count": 1}
        return {"low": {"digest": prompt_digest(prompt), "entry": entry, "most": 3, "most_per_key": 2,
                        "kept_ms": 60_000, **limits}}  # fmt: skip

    return make


def prompts(queue: Queue) -> dict[str, tuple[float, int]]:
    return {entry["prompt"]: (entry["percentile"], entry["count"]) for entry in hash_of(queue, "fb").values()}


def test_a_prompt_is_kept_once_with_its_lowest_rank(queue: Queue, low: Callable[..., dict[str, Any]]) -> None:
    for percentile in (10.0, 4.0, 7.0):
        finish(queue, low("a", percentile))
    assert prompts(queue) == {"a": (4.0, 3)}


def test_the_log_is_bounded_for_a_key_and_for_all(queue: Queue, low: Callable[..., dict[str, Any]]) -> None:
    for key in ("x", "y"):
        for k in range(3):
            finish(queue, low(f"{key}{k}"), key=key)
    assert set(prompts(queue)) == {"x1", "y0", "y1"}  # of each key two, of all three: the oldest goes
    assert queue.client.hgetall(f"{queue.prefix}fc") == {"x": "1", "y": "2"}


def test_a_stream_is_of_a_size_as_it_is_named_and_tested_against_the_reference_of_that_size() -> None:
    wide = RewardReference(5.0, 1.0, {"5": 4.0, "50": 5.0, "95": 6.0}, count=1000)
    known = replace(REFERENCE, at={"4": REFERENCE, "4 96x32": wide})
    student = replace(STUDENT, reward_reference={"trained": known})
    [row] = notes_of(student, a_job(height=32, width=96), [Judged({"trained": 4.5})], TIMING, POLICY)["drift"]
    seen = observe(wide, [4.5])
    assert seen and row == {
        "key": "fake/1|4|96x32|trained|raw", "score": 4.5, "low": seen.low, "by": factors(wide, seen),
        "limit": threshold(2), "cap": CAP * threshold(2),
    }  # fmt: skip
    [tall] = notes_of(student, a_job(height=96, width=32), [Judged({"trained": 4.5})], TIMING, POLICY)["drift"]
    assert tall == {"key": "fake/1|4|32x96|trained|raw", "score": 4.5, "low": 0.0}


def test_a_prompt_is_seen_again_only_as_the_same_version_draws_it() -> None:
    def seen(**changes: Any) -> Any:
        return notes_of(STUDENT, a_job(**changes), [judged(0.0)], TIMING, POLICY)["seen"]

    usual = seen(prompt="a red heart")
    assert usual == seen(prompt=" a  red\theart ", seeds=(9,), key="k") and len(bytes.fromhex(usual)) == 8
    others = [{"prompt": "b"}, {"model": "m"}, {"version": "2"}, {"steps": 2}, {"height": 32}, {"width": 32}]
    found = {seen(**{"prompt": "a red heart", **changes}) for changes in others}
    assert len(found) == len(others) and usual not in found


@pytest.mark.parametrize(
    ("ranks", "percentile"),
    [
        ([{"trained": 19.9}], 19.9),
        ([{"trained": 20.0}], None),
        ([{"trained": 10.0}, {"trained": 30.0}], None),
        ([{"trained": 10.0}, {"trained": 29.0}], 19.5),
        ([{"trained": 10.0}, {}], 10.0),
        ([{"heldout": 1.0}], None),
        ([{"trained": 10.0, "heldout": 1.0, "another": 2.0}], 10.0),
        ([{}], None),
    ],
)
def test_how_low_a_prompt_ranks_is_the_mean_of_its_pictures_that_have_a_rank(
    ranks: list[dict[str, float]], percentile: float | None
) -> None:
    said = [Judged({}, one) for one in ranks]
    low = notes_of(STUDENT, a_job(may_train=True), said, TIMING, POLICY).get("low")
    assert (low and low["entry"]["percentile"]) == percentile


def test_of_several_trained_scorers_the_lowest_rank_counts() -> None:
    trained = STUDENT.scorers["trained"]
    student = replace(STUDENT, scorers={**STUDENT.scorers, "another": trained})
    said = [
        Judged({}, {"trained": 15.0, "another": 5.0, "heldout": 1.0}),
        Judged({}, {"trained": 9.0, "another": 90.0}),
    ]
    low = notes_of(student, a_job(may_train=True), said, TIMING, POLICY)["low"]
    assert low["entry"]["percentile"] == 7.0
