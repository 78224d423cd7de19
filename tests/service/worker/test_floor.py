"""The floor and its fall under load: worked examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.worker.floor import Load, floor_of, further_cost, percentile_under
from student.bundle import RewardReference, Student
from student.runtimes.fake import fake_student
from tests.service.support import a_job

# Scores are evenly spread from -1 to 1; at 2 steps from 0 to 1.
AT_2 = RewardReference(0.5, 0.3, {"0": 0.0, "100": 1.0})
KNOWN = RewardReference(0.0, 0.6, {"0": -1.0, "50": 0.0, "100": 1.0}, {"2": AT_2})


def student() -> Student:
    return replace(fake_student(), reward_reference={"trained": KNOWN})


def test_a_percentile_is_that_of_the_students_own_pictures_at_the_first_step_count() -> None:
    job = a_job(rank_by="trained", min_reward="p20", candidates=4)
    floor = floor_of(student(), job)
    assert floor is not None and (floor.score, floor.percentile) == (pytest.approx(-0.6), 20.0)
    floor = floor_of(student(), replace(job, steps=2, cascade=(2, 4)))
    assert floor is not None and floor.score == pytest.approx(0.2)
    number = floor_of(student(), replace(job, min_reward=0.5))
    assert number is not None and (number.score, number.percentile) == (0.5, 75.0)
    assert floor_of(student(), a_job()) is None
    assert floor_of(replace(student(), reward_reference={}), job) is None
    plain = floor_of(replace(student(), reward_reference={}), replace(job, min_reward=0.5))
    assert plain is not None and (plain.score, plain.percentile) == (0.5, None)


def test_a_percentile_is_that_of_pictures_of_the_same_size_where_they_were_measured() -> None:
    wide = replace(AT_2, percentiles={"0": 3.0, "100": 4.0})
    known = replace(KNOWN, at={"4 96x64": wide})  # pixels across and down
    sized = replace(student(), reward_reference={"trained": known})
    job = a_job(rank_by="trained", min_reward="p20", candidates=2)
    scores = [floor_of(sized, replace(job, width=w, height=h)) for w, h in ((96, 64), (64, 96), (64, 64))]
    assert [floor and floor.score for floor in scores] == pytest.approx([3.2, -0.6, -0.6])


def test_where_nothing_more_can_be_drawn_no_load_lowers_the_floor() -> None:
    assert percentile_under(20.0, 5.0, 0.0) == 20.0


@pytest.mark.parametrize(
    ("utilisation", "percentile"),
    [(0.0, 20.0), (0.5, 20.0), (0.8, 20.0), (1 / 1.1, 10.0), (0.99, 100 / 99), (1.0, 0.0), (3.0, 0.0)],
)
def test_it_falls_so_far_that_the_workers_keep_up(utilisation: float, percentile: float) -> None:
    """A further picture costs what the first did: at the percentile k the work is utilisation * (1 + k / 100)."""
    found = percentile_under(20.0, utilisation, 1.0)
    assert found == pytest.approx(percentile)
    assert found == 20.0 or utilisation * (1 + found / 100) == pytest.approx(max(1.0, utilisation))


def test_what_further_rounds_cost_is_counted_in_first_rounds() -> None:
    assert further_cost(a_job(candidates=2, min_reward=0.5)) == 1.0
    assert further_cost(a_job(candidates=4, min_reward=0.5)) == 1 + 0.5 * 2
    assert further_cost(a_job(steps=2, cascade=(2, 4, 8), min_reward=0.5)) == 2 + 0.5 * 4
    assert further_cost(a_job(steps=1, cascade=(1, 2), candidates=2, min_reward=0.5)) == 1 + 0.5 * 2 + 0.25 * 2
    # 1, 1, 2 draws of one step, then 1, 1, 2 of two: each round is drawn where all draws before it failed.
    several = a_job(steps=1, cascade=(1, 2), candidates=4, min_reward=0.5)
    assert further_cost(several) == 1 + 0.5 * 2 + 0.5**3 * 2 + 0.5**4 * 2 + 0.5**5 * 4
    assert further_cost(a_job()) == 0


def test_the_floor_in_effect_decides_who_goes_on_and_both_are_told() -> None:
    job = a_job(rank_by="trained", min_reward="p20", candidates=2)
    asked = floor_of(student(), job)
    assert asked is not None and asked.sends_on(-0.61) and not asked.sends_on(-0.6)
    low = asked.under(Load(1 / 1.1, False), job)
    assert low.lowered and not low.sends_on(-0.79) and low.sends_on(-0.81) and low.sends_on(float("-inf"))
    assert low.record() == {
        "scorer": "trained", "min_reward": "p20", "asked_score": asked.score, "score": pytest.approx(-0.8),
        "percentile": pytest.approx(10.0), "lowered": True, "utilization": 1 / 1.1,
    }  # fmt: skip
    full = asked.under(Load(1.5, False), job)
    assert not full.sends_on(-5.0) and not full.sends_on(float("-inf")), "nothing goes on where nothing can be done"
    idle = asked.under(Load(0.1, False), job)
    assert not idle.lowered and idle.score == asked.score


def test_a_floor_of_which_no_percentile_is_known_holds_until_the_workers_are_full() -> None:
    job = a_job(rank_by="trained", min_reward=0.5, candidates=2)
    asked = floor_of(replace(student(), reward_reference={}), job)
    assert asked is not None
    assert asked.under(Load(0.9, False), job).sends_on(0.4)
    assert not asked.under(Load(1.0, False), job).sends_on(0.4)
