"""What best_of is predicted to buy, against closed forms and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from student.bundle import WithinPrompt, from_json, to_json
from student.runtimes.fake import fake_student
from student.within_prompt import best_of, chosen, measure, normal_best_of, of, predicted_gain


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
    with pytest.raises(ValueError, match="5 prompts with 1 pictures each: accepted are two or more of both"):
        measure(pictures(0.3, prompts=5, seeds=1))


def test_the_gain_is_kept_for_up_to_16_and_taken_as_measured_up_to_the_last() -> None:
    assert [len(measure(pictures(0.3, 4, seeds)).gain["t"]) for seeds in (2, 16, 20)] == [2, 16, 16]
    known = WithinPrompt(9, 2, {"t": 2.0, "h": 3.0}, {"h t": 0.5}, {"t": (0.0, 1.5)})
    assert predicted_gain(known, "t", "t", 2) == 1.5 and predicted_gain(known, "t", "h", 2) == 0.5 * 3.0 * 1.5 / 2.0
    assert predicted_gain(known, "h", "t", 2) == pytest.approx(0.5 * 2.0 * np.pi**-0.5)


def test_a_scorer_that_is_the_same_within_every_prompt_says_nothing_of_another() -> None:
    flat = measure({"t": [[1.0, 1.0], [2.0, 2.0]], "h": [[1.0, 2.0], [0.0, 3.0]]})
    assert (flat.spread["t"], flat.correlation["h t"]) == (0.0, 0.0)
    assert predicted_gain(flat, "t", "h", 2) is None and predicted_gain(flat, "t", "t", 2) == 0.0
    unrelated = replace(flat, spread={"t": 1.0, "h": 1.0}, correlation={})
    assert predicted_gain(unrelated, "t", "h", 2) is None


def test_of_equal_scores_the_later_picture_is_the_one_whose_other_value_counts() -> None:
    """Which of several is chosen does not hang on a sort's whims."""
    scores, values = np.random.default_rng(0).integers(0, 3, (1, 300)).astype(float), np.arange(300.0)[None]
    last = max(range(300), key=lambda k: (scores[0, k], k))
    assert chosen(scores, values, 300) == pytest.approx([last])
    assert chosen(scores, values, 1) == pytest.approx([299 / 2])


def test_a_size_without_a_figure_of_its_own_has_that_of_its_steps() -> None:
    own, other = measure(pictures(0.3, 4, 2)), measure(pictures(0.9, 4, 2))
    student = replace(fake_student(), within_prompt={"4": own, "4 96x32": other})
    assert of(student, 4, (32, 96)) == other and of(student, 4, (128, 96)) == own


def test_it_is_kept_in_the_manifest_and_an_older_manifest_has_none() -> None:
    student = replace(fake_student(), within_prompt={"4": measure(pictures(0.3))})
    assert from_json(to_json(student)) == student and of(student, 4, (64, 64)) == student.within_prompt["4"]  # type: ignore[index]
    assert of(student, 2, (64, 64)) is None
    assert "within_prompt" not in to_json(fake_student()) and from_json(to_json(fake_student())) == fake_student()
    assert student.fingerprint() == fake_student().fingerprint(), "no pixel depends on it"
