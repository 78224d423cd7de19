"""The end of a job, action by action: what is stored, what the queue is told, and what is removed again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from redis.exceptions import RedisError

from service.quality.feedback import DAY_MS, FeedbackPolicy
from service.queue.job import Claimed, Job
from service.queue.rounds import Round, first_round
from service.worker import settling
from service.worker.batch import Maker
from service.worker.execution import Drawn, Executed, Failure
from service.worker.files import StoredFile
from service.worker.finishing import when_all
from service.worker.floor import Floor
from service.worker.provenance import Provenance
from service.worker.scoring import Judged
from service.worker.settling import Drawing, Settler, until_answered
from service.worker.signing import SigningError
from student.bundle import RewardReference
from student.runtimes.fake import fake_student
from tests.service.support import a_job

MAKER = Maker("a runtime", Provenance("fake", "1"), fake_student())
IMAGE = np.zeros((3, 16, 32), np.float32)
BROKEN = np.full((3, 16, 32), np.nan, np.float32)
SCORES = Judged({"heldout": 1.0, "trained": 0.5}, {"heldout": 84.0, "trained": 69.0})


def claim(job: Job) -> Claimed:
    return Claimed(job.id, "17", job.to_payload(), 2, 0.1)


def drawing(*images: Any, **changes: Any) -> Drawing:
    usual = Drawing(images or (IMAGE,), (SCORES,) * (len(images) or 1), 4, 0.25, 0.5, 0.125)
    return replace(usual, **changes)


class Around:
    """All that a settler touches; ``ended`` is what the queue answers, where that is not what it was asked for."""

    def __init__(self, ended: str = "") -> None:
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.away = 0  # how many writes fail
        self.signs: Callable[[bytes], bytes] | None = None
        self.is_dropped: str | None = None
        self.load: tuple[float, bool] | Exception = (0.0, False)
        self.trouble: Exception | None = None
        self.discarded: list[tuple[str, str]] = []
        self.let_go: list[Claimed] = []
        self._ended = ended
        self.feedback = FeedbackPolicy()

    def _tell(self, verb: str, answer: Any) -> Callable[..., Any]:
        def tell(*args: Any, **named: Any) -> Any:
            if self.trouble is not None:
                raise self.trouble
            self.told.append((verb, args, named))
            return answer

        return tell

    def _finish(self, id: str, token: str, state: str, *args: Any, **named: Any) -> Any:
        return self._tell("finish", self._ended or state)(id, token, state, *args, **named)

    def _load(self, *args: Any) -> tuple[float, bool]:
        self.told.append(("load", args, {}))
        if isinstance(self.load, Exception):
            raise self.load
        return self.load

    def _put(self, job: str, token: str, name: str, suffix: str, data: bytes) -> str:
        if self.away:
            self.away -= 1
            raise OSError("the disk is full")
        reference = f"{job}/{token}/{name}.{suffix}"
        self.files[reference] = data
        return reference

    def settler(self) -> Settler:
        consumer = SimpleNamespace(
            finish=self._finish, advance=self._tell("advance", "queued"),
            show=self._tell("show", None), progress=self._tell("progress", None), load=self._load,
        )  # fmt: skip
        store: Any = SimpleNamespace(put=self._put, discard=lambda job, token: self.discarded.append((job, token)))
        heartbeat = SimpleNamespace(dropped=lambda claimed: self.is_dropped, let_go=self.let_go.append)
        signs = self.signs
        signer: Any = signs and SimpleNamespace(sign=lambda data, suffix, origin: signs(data))
        parts: tuple[Any, ...] = (consumer, store, heartbeat, threading.Event())
        return Settler(*parts, provenance=False, signer=signer, feedback=self.feedback)

    def settle(
        self, job: Job, outcome: Drawing | Failure, calls: Sequence[dict[str, Any]] = (), drawn: Round | None = None
    ) -> bool:
        return self.settler().settle(MAKER, claim(job), drawn or first_round(job), outcome, calls)

    def finished(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (found,) = [(args, named) for verb, args, named in self.told if verb == "finish"]
        return found


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time; the clock goes on with them."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: sum(pauses))
    monkeypatch.setattr(settling, "time", clock)
    monkeypatch.setattr(threading.Event, "wait", lambda event, pause_s=None: pauses.append(pause_s))
    return pauses


def test_a_job_ends_with_its_files_scores_and_times() -> None:
    around, job = Around(), a_job(seeds=(7, 8))
    assert not around.settle(job, drawing(IMAGE, IMAGE), [{"images": 2}])
    (id, token, state, report), named = around.finished()
    assert (id, token, state) == (job.id, "17", "done") and not named["scores_follow"]
    first, second = report["images"]
    assert first["file"] == f"{job.id}/17/0.png" and second["file"] == f"{job.id}/17/1.png"
    assert first["sha256"] == hashlib.sha256(around.files[first["file"]]).hexdigest()
    assert (first["width"], first["height"], first["seed"], second["seed"]) == (32, 16, 7, 8)
    assert first["reward"] == SCORES.reward and first["reward_percentile"] == SCORES.reward_percentile
    times = report["timings"]
    assert (times["queue_s"], times["inference_s"], times["score_s"]) == (0.25, 0.5, 0.125) and times["encode_s"] >= 0
    assert report["runtime"] == "a runtime" and report["batch_size"] == 4 and report["scoring"] == ""
    assert report["calls"] == [{"images": 2}] and {row["score"] for row in named["notes"]["drift"]} == {1.0, 0.5}
    assert around.let_go == [claim(job)] and around.discarded == []


@pytest.mark.parametrize(("percentile", "kept"), [(70.0, True), (69.0, False)])
def test_a_prompt_that_may_train_is_kept_as_the_operator_has_set(percentile: float, kept: bool) -> None:
    around, job = Around(), a_job(may_train=True)
    around.feedback = FeedbackPolicy(percentile, most=50, days=2.0)
    around.settle(job, drawing())
    low = around.finished()[1]["notes"].get("low")
    assert (low is not None) is kept
    if low:
        assert (low["most"], low["most_per_key"], low["kept_ms"]) == (50, 5, 2 * DAY_MS)


def test_scores_that_follow_keep_the_job_held_and_are_noted_later() -> None:
    around, job = Around(), a_job()
    assert around.settle(job, drawing(scoring="pending"))
    _, named = around.finished()
    assert named == {"scores_follow": True, "notes": {}} and around.let_go == []


@pytest.mark.parametrize("ended", ["cancelled", "fenced", "expired"])
def test_no_scores_follow_where_the_job_has_ended_otherwise(ended: str) -> None:
    around, job = Around(ended), a_job()
    assert not around.settle(job, drawing(scoring="pending"))
    assert around.let_go == [claim(job)] and around.discarded == [(job.id, "17")]


def test_skipped_scores_do_not_follow() -> None:
    around, job = Around(), a_job()
    assert not around.settle(job, drawing(scoring="skipped"))
    (*_, report), named = around.finished()
    assert report["scoring"] == "skipped" and not named["scores_follow"] and around.let_go == [claim(job)]


@pytest.mark.parametrize(
    ("ended", "gone"), [("done", 0), ("failed", 1), ("cancelled", 1), ("expired", 1), ("fenced", 1)]
)
def test_files_that_no_record_points_at_are_removed(ended: str, gone: int) -> None:
    around = Around(ended)
    around.settle(a_job(), drawing())
    assert len(around.discarded) == gone and len(around.files) == 1


def test_what_nobody_wants_any_more_is_neither_stored_nor_kept() -> None:
    around, job = Around(), a_job()
    around.is_dropped = "cancelled"
    assert not around.settle(job, drawing())
    (_, _, state, report), _ = around.finished()
    assert state == "failed" and report["error"] == {"code": "generation_failed", "message": "The job was dropped."}
    assert around.files == {} and around.discarded == [(job.id, "17")] and around.let_go == [claim(job)]


def test_a_failure_is_reported_with_its_code_and_its_calls() -> None:
    around, job = Around(), a_job()
    assert not around.settle(job, Failure("out_of_memory", "Too large."), [{"images": 1}])
    (_, _, state, report), named = around.finished()
    assert state == "failed" and report == {
        "runtime": "a runtime", "calls": [{"images": 1}], "error": {"code": "out_of_memory", "message": "Too large."},
    }  # fmt: skip
    assert not named["scores_follow"] and not named["notes"] and around.discarded == [(job.id, "17")]


def test_a_broken_picture_fails_its_job() -> None:
    around = Around()
    around.settle(a_job(seeds=(7, 8)), drawing(IMAGE, BROKEN))
    (_, _, state, report), _ = around.finished()
    assert state == "failed" and report["error"]["code"] == "generation_failed"
    assert "not finite" in report["error"]["message"] and around.files == {}


def test_a_picture_that_cannot_be_signed_is_not_given_out(slept: list[float]) -> None:
    around = Around()

    def refuse(data: bytes) -> bytes:
        raise SigningError("the key has expired")

    around.signs = refuse
    around.settle(a_job(), drawing())
    (_, _, state, report), _ = around.finished()
    assert (state, report["error"]["code"]) == ("failed", "generation_failed") and "signed" in report["error"][
        "message"
    ]
    assert around.files == {} and slept == [], "it is not tried again"


def test_what_is_stored_is_what_was_signed() -> None:
    around = Around()
    around.signs = lambda data: b"signed " + data
    around.settle(a_job(), drawing())
    (*_, report), _ = around.finished()
    (data,) = around.files.values()
    assert data.startswith(b"signed ") and report["images"][0]["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("away", "state", "pauses"),
    [(0, "done", []), (1, "done", [0.1]), (2, "done", [0.1, 0.4]), (3, "failed", [0.1, 0.4])],
)
def test_a_store_that_is_away_is_tried_three_times(
    slept: list[float], away: int, state: str, pauses: list[float]
) -> None:
    around = Around()
    around.away = away
    around.settle(a_job(), drawing())
    (_, _, ended, report), _ = around.finished()
    assert ended == state and slept == pauses
    assert state == "done" or report["error"]["code"] == "storage_failed"


def test_a_canarys_half_is_sent_to_nobody_and_so_not_stored() -> None:
    around = Around()
    around.settle(a_job(pair={"epoch": "e", "id": "i", "half": "base"}), drawing())
    (_, _, state, report), named = around.finished()
    assert state == "done" and around.files == {} and "file" not in report["images"][0]
    assert named["notes"] == {"half": {"rewards": SCORES.reward, "call_s": 0.5, "batch": 4}}


def test_files_that_were_stored_meanwhile_are_not_stored_again_unless_that_failed() -> None:
    there: Future[StoredFile] = Future()
    there.set_result(StoredFile("there", "its digest", 1.0, 3.0))
    failed: Future[StoredFile] = Future()
    failed.set_exception(OSError("away for a moment"))
    around, job = Around(), a_job(seeds=(7, 8))
    around.settle(job, drawing(IMAGE, IMAGE, ahead={0: there, 1: failed}))
    (_, _, state, report), _ = around.finished()
    assert state == "done" and [one["file"] for one in report["images"]] == ["there", f"{job.id}/17/1.png"]
    assert list(around.files) == [f"{job.id}/17/1.png"]


FLOOR = Floor("trained", 0.8, 0.8, 0.8, 80.0, RewardReference(0.0, 1.0, {"0": -1.0, "100": 1.0}))


def chosen(**changes: Any) -> Job:
    seeds = {"seeds": (7, 8), "candidate_seeds": ((7, 107), (8, 108)), "candidates": 2}
    return a_job(**{"min_reward": 0.8, "rank_by": "trained", **seeds, **changes})


def test_a_picture_below_the_floor_goes_on_to_another_round_at_what_that_costs() -> None:
    around, job = Around(), chosen()
    better = Judged({"trained": 0.9}, {})
    assert not around.settle(job, drawing(IMAGE, IMAGE, judged=(better, SCORES), floor=FLOOR))
    (_, asked, _), (verb, args, named) = around.told
    following = first_round(job).following([1])
    assert following and asked == (job.id, following.job.cost) and verb == "advance"
    assert args[:2] == (job.id, "17") and args[2]["next"] == {"stage": 1, "images": [1]}
    assert named == {"shape": following.job.shape, "images": 1, "cost": following.job.cost}
    assert [one["below_floor"] for one in args[2]["images"]] == [False, True]
    assert around.let_go == [claim(job)] and around.discarded == [] and len(around.files) == 2


def test_a_round_that_would_end_too_late_is_not_begun() -> None:
    around = Around()
    around.load = (0.0, True)
    around.settle(chosen(), drawing(IMAGE, IMAGE, floor=FLOOR))
    (_, _, state, report), _ = around.finished()
    assert state == "done" and [one["below_floor"] for one in report["images"]] == [True, True]


def test_an_unknown_load_leaves_the_floor_as_it_was() -> None:
    around = Around()
    around.load = RedisError("away")
    around.settle(chosen(), drawing(IMAGE, IMAGE, floor=FLOOR))
    assert [verb for verb, *_ in around.told] == ["load", "advance"]


def test_the_queue_is_asked_for_the_load_only_where_a_round_might_follow() -> None:
    around = Around()
    good = Judged({"trained": 0.9}, {})
    around.settle(chosen(), drawing(IMAGE, IMAGE, judged=(good, good), floor=FLOOR))
    assert [verb for verb, *_ in around.told] == ["finish"]
    (*_, report), _ = around.finished()
    assert report["floor"]["percentile"] == 80.0 and report["floor"]["lowered"] is False


def test_a_call_to_the_queue_is_repeated_through_an_outage_and_given_up_after_a_minute(slept: list[float]) -> None:
    answers = iter([RedisError("away"), RedisError("away"), "done"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert until_answered(call, "trouble") == "done" and slept == [0.2, 0.2]

    def never() -> str:
        raise RedisError("away")

    slept.clear()
    assert until_answered(never, "trouble") is None
    assert settling.SETTLE_FOR_S <= sum(slept) <= settling.SETTLE_FOR_S + 1


def test_a_job_whose_end_is_unknown_is_let_go_and_its_files_stay() -> None:
    around, job = Around(), a_job()
    around.trouble = RedisError("away")
    assert not around.settle(job, drawing())
    assert around.let_go == [claim(job)] and around.discarded == [] and len(around.files) == 1


def test_previews_and_progress_that_fail_harm_nothing() -> None:
    around, job = Around(), a_job(previews=1)
    settler = around.settler()
    settler.show(MAKER, claim(job), job, 2, 0, IMAGE)
    settler.advance(claim(job), 3)
    (shown, progressed) = around.told
    (reference,) = around.files
    assert f"{job.id}/17/p2-0." in reference
    assert shown[:2] == ("show", (job.id, "17", {"2:0": reference})) and progressed[1] == (job.id, "17", 3)
    around.trouble, around.away = RedisError("away"), 1
    settler.show(MAKER, claim(job), job, 2, 0, IMAGE)
    settler.show(MAKER, claim(job), job, 2, 0, IMAGE)
    settler.advance(claim(job), 3)
    assert len(around.told) == 2


def test_what_is_to_be_done_after_all_is_done_once() -> None:
    done: list[str] = []
    futures: list[Future[bool]] = [Future(), Future(), Future()]
    when_all(futures, lambda: done.append("all"))
    futures[2].set_result(True)
    futures[0].set_exception(OSError())
    assert done == []
    futures[1].set_result(False)
    assert done == ["all"]
    when_all([], lambda: done.append("nothing to wait for"))
    assert done == ["all", "nothing to wait for"]


def test_an_undrawn_job_means_that_the_device_is_lost() -> None:
    assert Executed(undrawn=frozenset({0})).device_lost and not Executed((Drawn((), IMAGE, 0.0),)).device_lost
