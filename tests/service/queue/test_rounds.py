"""Which pictures are drawn of a job, and when: worked examples."""

from __future__ import annotations

import json

import pytest

from service.queue.job import Job
from service.queue.rounds import first_round, round_of, stages
from tests.service.support import a_job

SEEDS = ((7, 107, 207, 307, 407, 507), (8, 108, 208, 308, 408, 508))


def floored(candidates: int = 1, cascade: tuple[int, ...] = (), **fields: object) -> Job:
    return a_job(
        seeds=(7, 8), steps=cascade[0] if cascade else 4, candidates=candidates, candidate_seeds=SEEDS,
        rank_by="trained", cascade=cascade, **{"min_reward": 0.5, **fields},
    )  # fmt: skip


def drawn(job: Job) -> list[tuple[int, int, int]]:
    return [(stage.steps, stage.first, stage.end) for stage in stages(job)]


def test_without_a_floor_there_is_one_round_of_all_candidates() -> None:
    job = a_job(seeds=(7, 8), candidates=2, candidate_seeds=SEEDS, rank_by="trained")
    assert drawn(job) == [(4, 0, 2)]
    round = first_round(job)
    assert round.job.seeds == (7, 107, 8, 108) and [draw.image for draw in round.draws] == [0, 0, 1, 1]
    assert round.following([0, 1]) is None
    assert (job.images, job.cost) == (4, 4 * a_job().cost) == (round.job.images, round.job.cost)
    assert first_round(a_job(seeds=(3, 4))).job.seeds == (3, 4)


@pytest.mark.parametrize(
    ("candidates", "waves"),
    [(1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (5, [(0, 1), (1, 2), (2, 4), (4, 5)]),
     (16, [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)])],
)  # fmt: skip
def test_with_a_floor_each_round_doubles_what_was_drawn(candidates: int, waves: list[tuple[int, int]]) -> None:
    assert drawn(floored(candidates)) == [(4, *wave) for wave in waves]
    assert floored(candidates).images == 2, "only the first round is certain"


def test_a_cascade_takes_new_seeds_at_the_next_step_count() -> None:
    assert drawn(floored(1, (1, 2, 4))) == [(1, 0, 1), (2, 1, 2), (4, 2, 3)]
    assert drawn(floored(2, (1, 2))) == [(1, 0, 1), (1, 1, 2), (2, 2, 3), (2, 3, 4)]
    second = first_round(floored(1, (1, 2, 4))).following([1])
    assert second is not None and (second.job.steps, second.job.seeds) == (2, (108,))
    assert second.job.shape == "64x64|2" and second.job.cost == a_job(steps=2, seeds=(1,)).cost
    third = second.following([1])
    assert third is not None and third.job.seeds == (208,) and third.following([1]) is None
    assert second.following([]) is None


def test_previews_are_of_the_first_round() -> None:
    first = first_round(floored(1, (2, 4), previews=2))
    second = first.following([0])
    assert second is not None and (first.job.previews, second.job.previews) == (2, 0)


def test_a_round_is_found_again_by_what_the_one_before_has_left() -> None:
    job = floored(1, (1, 2, 4))
    following = first_round(job).following([1])
    assert following is not None
    best = {"images": [{"seed": 7}, {"seed": 8}], **following.noted()}
    found = round_of(Job.from_payload(job.to_payload()), json.dumps(best))
    assert (found.number, found.images, found.job.seeds, found.best) == (1, (1,), (108,), best)


@pytest.mark.parametrize(
    "best",
    ["", "rubbish", "[]", '{"images": []}', '{"images": [{}, {}], "next": {"stage": 9, "images": [0]}}',
     '{"images": [{}, {}], "next": {"stage": 1, "images": [5]}}',
     '{"images": [{}], "next": {"stage": 1, "images": [0]}}'],
)  # fmt: skip
def test_what_cannot_be_gone_on_with_is_drawn_anew(best: str) -> None:
    job = floored(2)
    assert round_of(job, best) == first_round(job)


def test_a_floor_of_zero_is_drawn_round_by_round() -> None:
    job = floored(2, (1, 2), min_reward=0.0)
    assert drawn(job) == [(1, 0, 1), (1, 1, 2), (2, 2, 3), (2, 3, 4)] and job.images == 2
    assert first_round(job).job.min_reward is None and first_round(job).draws[0].seed == 7
