"""Which requests a canary draws again, and what of them: nothing of who asked, and nothing that is waited for."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict, replace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.http.mirroring import Mirror, falls_into, pair_of
from service.models.choice import Choice, Served
from service.models.folder import Name
from service.quality.canary import Canary, Plan
from service.queue.job import Job, QueueOptions, Verdict
from student.runtimes.fake import fake_student
from tests.service.support import a_job

CANARY = Canary("fake", "1", "2", "epoch", 0.25, Plan())
CANDIDATE = Served(fake_student(), len)
ASKED = a_job(
    key="ann", user="user", metadata={"a": "b"}, previews=2, priority=3, request_id="r", traceparent="t",
    response_format="file", may_train=True, seeds=(7, 8), prompt="a red heart", output_format="webp", quality=50,
)  # fmt: skip


def test_both_halves_are_alike_and_say_nothing_of_who_asked() -> None:
    halves = pair_of(ASKED, CANARY)
    drawn = {"model", "height", "width", "steps", "prompt", "seeds", "output_format", "quality"}
    for half, version, side in zip(halves, ("1", "2"), ("base", "candidate"), strict=True):
        said = asdict(half)
        assert {name: said[name] for name in drawn} == {name: asdict(ASKED)[name] for name in drawn}
        model, epoch, pair, its_side = said["pair"].split("|")
        assert (model, epoch, its_side, len(pair)) == ("fake", "epoch", side, 16)
        rest = {name: said[name] for name in said.keys() - drawn - {"id", "pair"}}
        assert rest == {
            "key": "canary", "version": version, "priority": -5, "previews": 0, "user": None, "metadata": {},
            "response_format": "b64_json", "request_id": "", "traceparent": "", "may_train": False, "candidates": 1,
            "candidate_seeds": (), "rank_by": "", "min_reward": None, "cascade": (), "frames": 0, "fps": 0,
        }  # fmt: skip
    assert halves[0].pair.rpartition("|")[0] == halves[1].pair.rpartition("|")[0]
    ids = [half.id for half in (*halves, ASKED, *pair_of(ASKED, replace(CANARY, epoch="another")))]
    assert len(set(ids)) == 5 and all(len(bytes.fromhex(id)) == 16 for id in ids)
    assert pair_of(ASKED, CANARY) == halves, "the same job makes the same pair, whichever process sees it"


def test_a_share_of_the_jobs_falls_into_a_canary_as_their_ids_say() -> None:
    jobs = [replace(ASKED, id=hashlib.sha256(str(k).encode()).hexdigest()[:32]) for k in range(400)]

    def taken(canary: Canary) -> set[str]:
        return {job.id for job in jobs if falls_into(job, canary, CANDIDATE)}

    quarter = taken(CANARY)
    assert 70 < len(quarter) < 130 and taken(CANARY) == quarter
    assert taken(replace(CANARY, epoch="another")) != quarter, "another canary has others"
    assert len(taken(replace(CANARY, share=1.0))) == 400 and taken(replace(CANARY, share=1e-9)) == set()
    assert quarter < taken(replace(CANARY, share=0.5))


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, True),
        ({"steps": 2}, True),
        ({"steps": 3}, False),
        ({"height": 96, "width": 32}, True),
        ({"height": 32, "width": 96}, False),
        ({"width": 65}, False),
        ({"rank_by": "trained", "candidates": 2}, False),
        ({"pair": "m|e|p|base"}, False),
    ],
)
def test_what_only_one_version_draws_or_a_score_has_chosen_compares_nothing(
    changes: dict[str, Any], drawn: bool
) -> None:
    candidate = Served(fake_student(), len, sizes=((96, 32),))
    assert falls_into(replace(ASKED, **changes), replace(CANARY, share=1.0), candidate) is drawn


class Queue:
    """A queue that gives these verdicts, in order, and then 'ok'."""

    def __init__(self, *verdicts: str | Exception) -> None:
        self._verdicts = list(verdicts)
        self.asked: list[tuple[Job, QueueOptions]] = []
        self.cancelled: list[str] = []

    async def enqueue(self, job: Job, options: QueueOptions) -> Verdict:
        self.asked.append((job, options))
        verdict = self._verdicts.pop(0) if self._verdicts else "ok"
        if isinstance(verdict, Exception):
            raise verdict
        return Verdict(verdict, job.id, 0.0, 0)  # type: ignore[arg-type]

    async def cancel(self, id: str) -> str:
        self.cancelled.append(id)
        return "cancelled"


def mirrored(queue: Queue, job: Job = ASKED, **changes: Any) -> list[Job]:
    canary = replace(CANARY, **{"share": 1.0, **changes})
    served = {Name("fake", version): CANDIDATE for version in ("1", "2")}

    async def run() -> None:
        mirror = Mirror(queue)  # type: ignore[arg-type]
        mirror.mirror(job, Choice(served, {"fake": "1"}, {"fake": canary}))
        await asyncio.gather(*mirror._tasks)

    asyncio.run(run())
    return [each for each, _ in queue.asked]


def test_a_pair_waits_apart_from_all_quotas_and_is_never_many() -> None:
    queue = Queue()
    jobs = mirrored(queue)
    assert jobs == list(pair_of(ASKED, replace(CANARY, share=1.0))) and queue.cancelled == []
    assert {options for _, options in queue.asked} == {QueueOptions(900.0, quota=0, key_pending=64)}


def test_half_a_pair_is_not_drawn() -> None:
    queue = Queue("ok", "key_full")
    first, _ = mirrored(queue)
    assert queue.cancelled == [first.id]
    assert len(mirrored(queue := Queue("full"))) == 1 and queue.cancelled == []
    assert len(mirrored(queue := Queue("known", "known"))) == 2 and queue.cancelled == []


def test_a_queue_that_is_away_costs_a_pair_and_nothing_else() -> None:
    assert len(mirrored(Queue(RedisConnectionError("away")))) == 1


def test_nothing_is_drawn_again_without_a_canary_of_this_version() -> None:
    assert mirrored(Queue(), state="promoted") == [] and mirrored(Queue(), base="9") == []
    assert mirrored(Queue(), replace(ASKED, model="another")) == []
