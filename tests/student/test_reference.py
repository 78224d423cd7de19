"""Where a score lies among the student's own: distributions, percentiles and their inverse, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from student.bundle import RewardReference
from student.reference import (
    POINTS,
    at_key,
    distribution,
    failures,
    own_reference,
    percentile,
    reference_at,
    score_at,
    verdicts,
    with_distribution,
)
from student.runtimes.fake import fake_student

OWN, OTHER = (64, 64), (32, 96)
LINE = RewardReference(0.0, 1.0, {"0": -1.0, "50": 0.0, "90": 2.0, "100": 3.0})


def named(mean: float) -> RewardReference:
    return RewardReference(mean, 1.0, {"50": mean})


def test_a_distribution_is_that_of_its_scores() -> None:
    found = distribution([float(k) for k in range(101)])
    assert (found.mean, found.count) == (50.0, 101)
    assert found.std == pytest.approx(math.sqrt(sum((k - 50) ** 2 for k in range(101)) / 100)), "of a sample"
    assert found.percentiles == {str(point): float(point) for point in sorted(POINTS)}
    assert {0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100} <= set(POINTS)


@pytest.mark.parametrize(("prompts", "count"), [(None, 4), (2, 2), (9, 4)])
def test_scores_of_one_prompt_are_not_independent(prompts: int | None, count: int) -> None:
    assert distribution([1.0, 2.0, 3.0, 4.0], prompts).count == count


@pytest.mark.parametrize(
    ("score", "share"), [(-1.0, 0.0), (-0.5, 25.0), (0.0, 50.0), (1.0, 70.0), (2.5, 95.0), (3.0, 100.0)]
)
def test_a_percentile_and_its_score_are_each_others_inverse(score: float, share: float) -> None:
    assert percentile(LINE, score) == pytest.approx(share) and score_at(LINE, share) == pytest.approx(score)


def test_beyond_all_that_was_seen_is_the_end() -> None:
    assert (percentile(LINE, -9.0), percentile(LINE, 9.0)) == (0.0, 100.0)
    inner = RewardReference(0.0, 1.0, {"10": 1.0, "90": 2.0})
    assert (percentile(inner, 0.9), percentile(inner, 2.1)) == (0.0, 100.0)
    assert (score_at(inner, 1.0), score_at(inner, 99.0)) == (1.0, 2.0)


def test_points_are_ordered_as_numbers_and_never_fall() -> None:
    rough = RewardReference(0.0, 1.0, {"100": 3.0, "5": 1.0, "50": 0.5})
    assert percentile(rough, 2.0) == pytest.approx(75.0), "between 50, which counts as 1.0, and 100"
    assert score_at(rough, 50.0) == 1.0


def test_nothing_is_said_without_points() -> None:
    empty = RewardReference(0.0, 1.0, {})
    assert percentile(empty, 0.0) is None and score_at(empty, 50.0) is None


def test_a_key_has_the_size_only_where_it_is_not_the_students_own() -> None:
    student = fake_student()
    assert (at_key(student, 4, OWN), at_key(student, 4, OTHER)) == ("4", "4 96x32")


def test_the_nearest_distribution_is_compared_with_and_only_the_exact_one_is_the_students_own() -> None:
    at = {"2": named(2.0), "4": named(4.0), "4 96x32": named(4.5)}
    student = replace(fake_student(), reward_reference={"trained": replace(named(0.0), at=at)})

    def means(steps: int, size: tuple[int, int]) -> tuple[float | None, float | None]:
        near, own = (find(student, "trained", steps, size) for find in (reference_at, own_reference))
        return near and near.mean, own and own.mean

    assert means(4, OWN) == (4.0, 4.0) and means(4, OTHER) == (4.5, 4.5)
    assert means(2, OTHER) == (2.0, None), "the same steps at another size"
    assert means(1, OWN) == (0.0, None), "none of these steps"
    assert reference_at(student, "heldout", 4, OWN) is None is own_reference(student, "heldout", 4, OWN)


def test_a_bundle_of_before_says_it_of_its_first_steps_at_its_own_size() -> None:
    student = replace(fake_student(), reward_reference={"trained": named(0.0)})
    first, second = student.steps[:2]
    assert own_reference(student, "trained", first, OWN) == named(0.0)
    assert own_reference(student, "trained", second, OWN) is None is own_reference(student, "trained", first, OTHER)
    assert reference_at(student, "trained", second, OTHER) == named(0.0)


def test_the_first_distribution_stands_for_the_whole() -> None:
    one = with_distribution(None, "4", named(4.0))
    two = with_distribution(one, "2", named(2.0))
    assert (one.mean, two.mean) == (4.0, 4.0) and {key: of.mean for key, of in (two.at or {}).items()} == {
        "4": 4.0, "2": 2.0,
    }  # fmt: skip


def test_a_verdict_has_each_score_and_its_rank_and_leaves_out_a_scorer_that_failed() -> None:
    student = replace(fake_student(), reward_reference={"trained": LINE})
    scores = {"trained": np.float32([-0.5, np.nan, 0.1]), "heldout": np.float32([1.0, 2.0, np.inf])}
    first, second, third = verdicts(student, scores, 4, OWN, 3)
    assert (first.reward, first.percentile) == ({"trained": -0.5, "heldout": 1.0}, {"trained": 25.0})
    assert (second.reward, second.percentile) == ({"heldout": 2.0}, {})
    assert set(third.reward) == {"trained"} and third.percentile == {"trained": 52.0}, "rounded to a tenth"
    assert failures(scores) == {"trained": 1, "heldout": 1} and failures({"a": np.float32([1.0])}) == {}
