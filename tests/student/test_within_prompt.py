"""What best_of is predicted to buy, against closed forms and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from student.bundle import from_json, to_json
from student.runtimes.fake import fake_student
from student.within_prompt import best_of, measure, normal_best_of, of, predicted_gain


def pictures(correlation: float, prompts: int = 400, seeds: int = 16) -> dict[str, list[list[float]]]:
    """Two scorers, normal within each prompt with the deviations 2 and 3, on prompts of very different difficulty."""
    rng = np.random.default_rng(1)
    a, b, hard = (
        rng.normal(size=(prompts, seeds)),
        rng.normal(size=(prompts, seeds)),
        50 * rng.normal(size=(prompts, 1)),
    )
    other = correlation * a + (1 - correlation**2) ** 0.5 * b
    return {"t": (hard + 2 * a).tolist(), "h": (-hard + 3 * other).tolist()}


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (2, np.pi**-0.5), (3, 1.5 * np.pi**-0.5), (8, 1.42360)])
def test_the_highest_of_normal_numbers(count: int, expected: float) -> None:
    assert normal_best_of(count) == pytest.approx(expected, abs=1e-4)


def test_the_gain_is_the_mean_over_all_choices() -> None:
    scores_PS = np.random.default_rng(0).normal(size=(3, 6))
    for count in (1, 2, 4, 6):
        every = [scores_PS[:, list(chosen)].max(axis=1) for chosen in combinations(range(6), count)]
        assert best_of(scores_PS, count) == pytest.approx(np.mean(every, axis=0))


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.3, 0.9])
def test_spread_and_correlation_are_those_within_a_prompt(correlation: float) -> None:
    found = measure(pictures(correlation))
    assert (found.prompts, found.seeds) == (400, 16)
    assert found.spread == {"t": pytest.approx(2, rel=0.03), "h": pytest.approx(3, rel=0.03)}
    assert found.correlation == {"h t": pytest.approx(correlation, abs=0.04)}
    assert found.gain["t"][0] == pytest.approx(0, abs=1e-3)
    for count in (2, 4, 8, 16):
        assert found.gain["t"][count - 1] == pytest.approx(2 * normal_best_of(count), rel=0.04)
        assert predicted_gain(found, "t", "t", count) == found.gain["t"][count - 1]
        expected = 3 * correlation * normal_best_of(count)
        assert predicted_gain(found, "t", "h", count) == pytest.approx(expected, abs=0.3)


def test_beyond_what_was_measured_normal_numbers_are_taken() -> None:
    found = measure(pictures(0.3, seeds=4))
    assert predicted_gain(found, "t", "t", 16) == pytest.approx(normal_best_of(16) * found.spread["t"])
    assert predicted_gain(found, "t", "nobody", 2) is None and predicted_gain(found, "nobody", "t", 2) is None


def test_a_prompt_with_a_score_that_is_none_is_left_out_and_too_little_is_refused() -> None:
    scores = pictures(0.3, prompts=5)
    scores["t"][0][0] = float("nan")
    assert measure(scores).prompts == 4
    with pytest.raises(ValueError, match="1 prompts with 16 pictures"):
        measure(pictures(0.3, prompts=1))


def test_it_is_kept_in_the_manifest_and_an_older_manifest_has_none() -> None:
    student = replace(fake_student(), within_prompt={"4": measure(pictures(0.3))})
    assert from_json(to_json(student)) == student and of(student, 4, (64, 64)) == student.within_prompt["4"]  # type: ignore[index]
    assert of(student, 2, (64, 64)) is None
    assert "within_prompt" not in to_json(fake_student()) and from_json(to_json(fake_student())) == fake_student()
    assert student.fingerprint() == fake_student().fingerprint(), "no pixel depends on it"
