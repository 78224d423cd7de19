"""What a job gets of the calls that its pictures were drawn in: its own rows, their times, and what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.observe.tracer import BatchTrace
from service.queue.job import Claimed
from service.queue.rounds import first_round
from service.worker import finishing, late_scores
from service.worker.batch import Batch
from service.worker.batching import Slot
from service.worker.execution import Drawn, Executed, Failure
from service.worker.finishing import Finisher, Scored, _outcome, _reports
from service.worker.late_scores import LateScores
from service.worker.scoring import Judged, ScorePolicy
from service.worker.settling import DROPPED, Drawing
from student.runtimes.fake import FakeRuntime
from tests.service.support import a_job, eventually


def slots(*rows: tuple[int, int]) -> tuple[Slot, ...]:
    return tuple(Slot(job, index, "a red heart", 10 * job + index) for job, index in rows)


def images(*values: float) -> Any:
    return np.stack([np.full((3, 2, 2), value, np.float32) for value in values])


def judged(*scores: float) -> tuple[Judged, ...]:
    return tuple(Judged({"trained": score}) for score in scores)


# Three jobs of one, two and one image: the second one's are drawn in two calls, and the third one's with its last.
JOBS = [a_job(seeds=(0,)), a_job(seeds=(10, 11), rank_by="trained", min_reward=0.5), a_job(seeds=(20,))]
FIRST = Drawn(slots((0, 0), (1, 0)), images(0.0, 0.1), 2.0)
LAST = Drawn(slots((1, 1), (2, 0)), images(0.2, 0.3), 3.0, splits=1)
SCORED = [Scored(FIRST, judged(0.0, 1.0), 0.25), Scored(LAST, judged(2.0, 3.0), 0.5)]
CLAIMED = tuple(Claimed(job.id, "17", job.to_payload(), 1, float(k)) for k, job in enumerate(JOBS))
BATCH = Batch(FakeRuntime(), CLAIMED, tuple(map(first_round, JOBS)), claimed_at=100.0)


def outcome(number: int, **fields: Any) -> Drawing | Failure:
    return _outcome(BATCH, number, fields.pop("executed", Executed((FIRST, LAST))), SCORED, 104.0, **fields)


@pytest.mark.parametrize(
    ("number", "values", "scores", "waited_s", "drawn_s", "scored_s"),
    [
        (0, [0.0], [0.0], 4.0, 2.0, 0.25),
        (1, [0.1, 0.2], [1.0, 2.0], 5.0, 5.0, 0.75),
        (2, [0.3], [3.0], 6.0, 3.0, 0.5),
    ],
)
def test_each_job_gets_its_own_pictures_scores_and_times(
    number: int, values: list[float], scores: list[float], waited_s: float, drawn_s: float, scored_s: float
) -> None:
    found = outcome(number)
    assert isinstance(found, Drawing)
    assert [float(image.mean()) for image in found.images] == pytest.approx(values)
    assert [one.reward["trained"] for one in found.judged] == scores
    assert (found.queue_s, found.inference_s, found.score_s) == (waited_s, drawn_s, scored_s)
    assert found.batch_size == 2 and (found.floor is not None) == (number == 1) and found.scoring == ""


def test_every_call_of_a_scorer_is_watched_and_candidates_are_scored_whatever_the_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scorer that hangs would hold its jobs for ever."""
    done = list[Any]()

    @contextmanager
    def guard(what: str) -> Iterator[None]:
        done.append(f"begin {what}")
        yield
        done.append(f"end {what}")

    def judge(runtime: Any, images_BCHW: Any, prompts: Any, seeds: Any, steps: int, *how: Any) -> tuple[Judged, ...]:
        done.append((len(images_BCHW), list(prompts), list(seeds), steps, how))
        return judged(*range(len(images_BCHW)))

    monkeypatch.setattr(finishing, "judge", judge)
    monkeypatch.setattr(late_scores, "judge", judge)
    policy, around = ScorePolicy(0.5), ["begin a scorer", "end a scorer"]
    late = LateScores(None, None, guard, policy)  # type: ignore[arg-type]
    scored = Finisher(None, late, guard, policy)._scored(BATCH, LAST)  # type: ignore[arg-type]
    assert scored.judged == judged(0, 1) and scored.call is LAST
    assert done == [around[0], (2, ["a red heart"] * 2, [11, 20], 4, (policy, [0])), around[1]], "row 0 is a candidate"
    done.clear()
    assert late._judged(BATCH, FIRST, {1})[0] == {1: list(judged(0))}
    assert done == [around[0], (1, ["a red heart"], [10], 4, (policy,)), around[1]], "of what failed nothing is scored"


def test_late_scores_are_those_of_each_jobs_own_pictures_and_calls_and_then_none_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second job's pictures are of both calls; the third one has failed meanwhile: nobody awaits its scores."""
    told, let_go = dict[str, tuple[Any, ...]](), list[str]()

    def judge(runtime: Any, images_BCHW: Any, prompts: Any, seeds: Any, *_: Any) -> tuple[Judged, ...]:
        return judged(*map(float, seeds))

    moments = iter([10.0, 10.5, 20.0, 22.0])  # half a second for the first call, two for the last
    monkeypatch.setattr(late_scores, "judge", judge)
    monkeypatch.setattr(late_scores, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    consumer: Any = SimpleNamespace(score=lambda id, *about: told.update({id: about}))
    heartbeat: Any = SimpleNamespace(let_go=lambda claimed: let_go.append(claimed.id))
    late = LateScores(consumer, heartbeat, nullcontext, ScorePolicy.parse("after"))
    assert late.admits((FIRST, LAST))
    late.score(BATCH, (FIRST, LAST), [0, 1])
    assert late.wait_until_empty(20.0)
    found = {
        number: ([one["reward"]["trained"] for one in told[JOBS[number].id][1]["images"]], told[JOBS[number].id][1])
        for number in (0, 1)
    }
    assert [found[number][0] for number in (0, 1)] == [[0.0], [10.0, 11.0]]
    assert [found[number][1]["score_s"] for number in (0, 1)] == [0.5, 2.5]
    assert {about[0] for about in told.values()} == {"17"} and len(told) == 2
    assert let_go == [JOBS[0].id, JOBS[1].id]


@pytest.mark.parametrize(("policy", "thread"), [("always", "score"), ("after", "late-scores")])
def test_a_probe_is_judged_by_the_thread_that_scores_and_its_failure_ends_nothing(policy: str, thread: str) -> None:
    """A scorer need not bear two callers."""
    done = list[str]()

    @contextmanager
    def guard(what: str) -> Iterator[None]:
        done.append(what)
        yield

    def probe() -> None:
        done.append(threading.current_thread().name.rpartition("_")[0])
        raise ValueError("a broken scorer")

    chosen = ScorePolicy.parse(policy)
    finisher = Finisher(None, LateScores(None, None, guard, chosen), guard, chosen)  # type: ignore[arg-type]
    for _ in range(2):
        finisher.beside(probe)
    assert finisher.drain(20.0) and done == ["a scorer", thread] * 2


class Settled:
    """A settler that notes what it is to end, and how; files go nowhere."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, Any]] = []
        self.files = SimpleNamespace(store=lambda *_: None)

    def unwanted(self, claimed: Claimed) -> bool:
        return False

    def settle(self, maker: Any, claimed: Claimed, drawn: Any, outcome: Any, calls: Any) -> bool:
        self.done.append(("settle", claimed.id, outcome))
        return False

    def fail(self, maker: Any, claimed: Claimed, failure: Failure) -> None:
        self.done.append(("fail", claimed.id, failure))


@pytest.mark.parametrize("policy", ["always", "after", "0"])
def test_a_batch_in_which_pictures_are_chosen_is_scored_at_once_and_what_was_given_up_is_not_ended_twice(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def judge(runtime: Any, images_BCHW: Any, *_: Any) -> tuple[Judged, ...]:
        asked.append(len(images_BCHW))
        return judged(*range(len(images_BCHW)))

    monkeypatch.setattr(finishing, "judge", judge)
    settler: Any = Settled()
    late: Any = SimpleNamespace(wait_until_empty=lambda _: True)
    finisher = Finisher(settler, late, nullcontext, ScorePolicy.parse(policy))
    executed = Executed((FIRST, LAST), undrawn=frozenset({2}))
    finisher.submit(BATCH, executed, 104.0, BatchTrace(), ended={0})
    assert finisher.drain(20.0) and asked == [2, 2]
    [(verb, id, outcome)] = settler.done
    assert (verb, id, outcome.scoring) == ("settle", JOBS[1].id, ""), "the first was given up, the last not drawn"
    assert [one.reward["trained"] for one in outcome.judged] == [1, 0]


@pytest.mark.parametrize("what", ["show", "advance"])
def test_a_job_is_not_ended_before_its_preview_or_report_is_out(what: str) -> None:
    settler: Any = Settled()
    ready = threading.Event()

    def slowly(*_: Any) -> None:
        assert ready.wait(20.0)
        settler.done.append((what, "", None))

    settler.show = settler.advance = slowly
    late: Any = SimpleNamespace(wait_until_empty=lambda _: True)
    finisher = Finisher(settler, late, nullcontext, ScorePolicy())
    if what == "show":
        finisher.show(BATCH, 1, 0, 0, images(0.5)[0])
    else:
        finisher.advance(BATCH, 1, 2)
    finisher.give_up(BATCH, 1)
    assert not finisher.drain(0.1) and settler.done == []
    ready.set()
    assert finisher.drain(20.0) and [verb for verb, *_ in settler.done] == [what, "fail"]


def test_whoever_draws_waits_for_room_for_its_pictures_and_nobody_for_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch that is refused or given up, or a probe that is judged, must not hold up the thread that draws."""
    room = list[tuple[str, int, bool]]()
    backlog = SimpleNamespace(
        add=lambda num_bytes, wait=True: room.append(("add", num_bytes, wait)),
        remove=lambda num_bytes: room.append(("remove", num_bytes, True)),
    )
    monkeypatch.setattr(finishing, "judge", lambda runtime, images_BCHW, *_: judged(*range(len(images_BCHW))))
    settler: Any = Settled()
    finisher = Finisher(settler, None, nullcontext, ScorePolicy())  # type: ignore[arg-type]
    finisher._backlog = backlog  # type: ignore[assignment]

    def over(count: int) -> list[tuple[str, int, bool]]:
        return eventually(lambda: len(room) == count and room[count - 2 :], "it is over")

    finisher.submit(BATCH, Executed((FIRST, LAST)), 104.0, BatchTrace())
    num_bytes = 4 * 3 * 2 * 2 * 4
    assert over(2) == [("add", num_bytes, True), ("remove", num_bytes, True)] and len(settler.done) == 3
    small = [("add", 0, False), ("remove", 0, True)]
    finisher.refuse(BATCH.maker, CLAIMED[0], DROPPED)
    assert over(4) == small
    finisher.give_up(BATCH, 1)
    assert over(6) == small
    finisher.beside(lambda: None)
    assert over(8) == small
    assert [(verb, id) for verb, id, _ in settler.done[3:]] == [("fail", JOBS[0].id), ("fail", JOBS[1].id)]


def test_whether_scores_follow_is_said() -> None:
    for scoring in ("pending", "skipped"):
        found = outcome(0, scoring=scoring)
        assert isinstance(found, Drawing) and found.scoring == scoring


def test_a_job_that_failed_or_was_not_drawn_to_its_end_has_no_pictures() -> None:
    failure = Failure("out_of_memory", "Too large.")
    assert outcome(0, executed=Executed((FIRST, LAST), {0: failure})) is failure
    assert outcome(1, executed=Executed((FIRST,))) is DROPPED


def test_a_call_is_reported_with_its_images_time_and_splits() -> None:
    assert _reports(Executed((FIRST, LAST))) == (
        {"images": 2, "inference_s": 2.0, "splits": 0},
        {"images": 2, "inference_s": 3.0, "splits": 1},
    )


def test_a_batch_is_the_sum_of_its_jobs() -> None:
    assert (BATCH.images, BATCH.token, BATCH.chooses, BATCH.suspect) == (4, "17", True, False)
    assert BATCH.waiting_since == 98.0, "of its oldest job"
    assert BATCH.shape == ("fake", "1", 64, 64, 0, 4) and BATCH.prompts == ("a red heart",) * 3
    assert BATCH.maker.runtime == "fake" and (BATCH.maker.origin.model, BATCH.maker.origin.version) == ("fake", "1")
    alone = Batch(FakeRuntime(), (CLAIMED[0], Claimed("b", "17", "", 2, 0.0)), (BATCH.rounds[0], BATCH.rounds[2]))
    assert alone.suspect and not alone.chooses, "one of them was lost before"
