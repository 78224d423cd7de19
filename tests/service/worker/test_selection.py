"""Which candidate is kept: worked examples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from service.queue.rounds import first_round, round_of
from service.worker.floor import Floor
from service.worker.scoring import Judged
from service.worker.selection import Kept, select, with_earlier, with_floor
from tests.service.support import a_job

SEEDS = ((7, 107), (8, 108))


def judged(*trained: float | None) -> list[Judged]:
    return [
        Judged({"heldout": 9.0, **({} if score is None else {"trained": score})}, {"heldout": 50.0})
        for score in trained
    ]


def best_of_two(**fields: Any) -> Any:
    return a_job(seeds=(7, 8), candidates=2, candidate_seeds=SEEDS, rank_by="trained", **fields)


def seeds(kept: tuple[Kept | None, ...]) -> list[int | None]:
    return [one.about["seed"] if one else None for one in kept]


def test_the_highest_score_wins_and_the_earliest_of_equal_ones() -> None:
    kept = select(first_round(best_of_two()), judged(0.1, 0.9, 0.5, 0.5), [True] * 4)
    assert seeds(kept) == [107, 8] and [one.row for one in kept if one] == [1, 2]
    first = kept[0]
    assert first is not None and first.score == 0.9
    assert first.about["reward"] == {"heldout": 9.0, "trained": 0.9} and first.about["reported"] == {"heldout": 9.0}
    assert [(one["seed"], one["rank"], one["steps"], one["round"]) for one in first.about["candidates"]] == [
        (7, 2, 4, 1), (107, 1, 4, 1),
    ]  # fmt: skip


def test_what_has_no_score_comes_last_and_what_is_broken_is_never_kept() -> None:
    round = first_round(best_of_two())
    assert seeds(select(round, judged(None, -5.0, None, None), [True] * 4)) == [107, 8]
    kept = select(round, judged(9.0, None, -5.0, 9.0), [False, True, True, False])
    assert seeds(kept) == [107, 8]
    assert kept[0] is not None and kept[0].about["candidates"][0]["broken"] and kept[0].score == -math.inf
    assert seeds(select(round, judged(1.0, 1.0, 1.0, 1.0), [True, True, False, False])) == [7, None]


def test_a_later_round_replaces_only_what_it_beats() -> None:
    job = best_of_two(min_reward=5.0)
    first = first_round(job)
    before = [dict(one.about, file=f"f{k}") for k, one in enumerate(select(first, judged(0.5, 0.7), [True] * 2)) if one]
    for score, row, seed in ((0.6, 0, 107), (0.4, None, 7)):
        second = round_of(job, "")
        following = first.following([0])
        assert following is not None
        second = type(following)(job, following.number, following.images, {"images": before})
        kept = select(second, judged(score), [True])
        assert seeds(kept) == [seed, 8]
        assert kept[0] is not None and kept[0].row is row and kept[0].score == max(score, 0.5)
        assert [one["rank"] for one in kept[0].about["candidates"]] == ([2, 1] if row == 0 else [1, 2])
        assert kept[1] == Kept(None, before[1], 0.7), "it was not drawn again"


def test_without_a_choice_nothing_is_told_of_one() -> None:
    kept = select(first_round(a_job(seeds=(1, 2))), judged(0.1, 0.2), [True, False])
    assert kept[1] is None and kept[0] is not None
    assert set(kept[0].about) == {"seed", "reward", "reward_percentile"}


def test_a_result_tells_what_all_of_its_rounds_took() -> None:
    job = best_of_two(min_reward=5.0)
    best = {"timings": {"inference_s": 1.5, "score_s": 0.25}, "batch_size": 6}
    following = first_round(job).following([0])
    assert following is not None
    second = type(following)(job, following.number, following.images, best)
    now = {"timings": {"inference_s": 2.0, "score_s": 0.5, "encode_s": 0.125}, "batch_size": 4}
    assert with_earlier(second, now) == {
        "timings": {"inference_s": 3.5, "score_s": 0.75, "encode_s": 0.125}, "batch_size": 6,
    }  # fmt: skip
    assert with_earlier(first_round(job), now) == now


def test_after_the_last_round_the_answer_has_the_floor_that_turned_an_image_away() -> None:
    job = a_job(seeds=(7, 8), rank_by="trained", min_reward="p50", cascade=(1, 2))
    asked = Floor("trained", "p50", 0.0, 0.0, 50.0)
    lowered = replace(asked, score=-1.0, percentile=5.0, utilisation=0.9)
    kept = [Kept(0, {"seed": 7}, -0.5), Kept(1, {"seed": 8}, 0.5)]
    result = {"images": [{"seed": 7}, {"seed": 8}]}
    first = with_floor(first_round(job), result, kept, lowered)
    assert first["floor"] == lowered.record() and [one["below_floor"] for one in first["images"]] == [True, False]
    last = replace(first_round(job), number=1, best=first)
    assert with_floor(last, result, kept, asked)["floor"] == lowered.record()
    again = replace(lowered, score=-2.0, percentile=1.0)
    assert with_floor(last, result, kept, again)["floor"] == again.record(), "what is decided anew counts"
    assert with_floor(first_round(job), result, kept, asked)["floor"] == asked.record()
