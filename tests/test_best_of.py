"""The benchmark of best_of and cascades computes what the service would have drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import best_of
from student.bundle import RewardReference
from student.runtimes.fake import fake_student
from student.within_prompt import chosen

STUDENT = replace(fake_student(), reward_reference={"trained": RewardReference(0.0, 1.0, {"0": -2.0, "100": 2.0})})


def drawn(prompts: int = 5) -> best_of.Pictures:
    rng = np.random.default_rng(0)
    return {
        steps: {name: rng.normal(size=(prompts, best_of.SEEDS)) for name in best_of.MEASURES} for steps in best_of.STEPS
    }


def test_what_is_chosen_brings_its_own_other_values() -> None:
    rng = np.random.default_rng(1)
    scores_PS, values_PS = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    assert chosen(scores_PS, values_PS, 1) == pytest.approx(values_PS.mean(axis=1))
    assert chosen(scores_PS, values_PS, 7) == pytest.approx(values_PS[np.arange(3), scores_PS.argmax(axis=1)])
    found = []
    for _ in range(4000):
        few = rng.permutation(7)[:3]
        found.append(values_PS[np.arange(3), few[scores_PS[:, few].argmax(axis=1)]])
    assert chosen(scores_PS, values_PS, 3) == pytest.approx(np.mean(found, axis=0), abs=0.06)


@pytest.mark.parametrize(("cascade", "candidates"), [((2, 4, 8), 1), ((2,), 4), ((2, 4), 2)])
def test_a_floor_is_served_image_by_image(cascade: tuple[int, ...], candidates: int) -> None:
    """The answer key: each image alone, by the rules in docs/api.md (waves of 1, 1, 2 candidates)."""
    found, limit = drawn(), -2.0 + 4.0 * 0.35
    waves = {1: [[0]], 2: [[0], [1]], 4: [[0], [1], [2, 3]]}[candidates]
    values: dict[str, list[float]] = {name: [] for name in best_of.MEASURES}
    calls = 0
    for prompt in range(5):
        for image in range(best_of.SEEDS):
            best: tuple[float, int, int] | None = None
            for level, steps in enumerate(cascade):
                for wave in waves:
                    if best and best[0] >= limit:
                        continue
                    for c in wave:
                        column = (image + level * candidates + c) % best_of.SEEDS
                        calls += steps
                        score = float(found[steps]["trained"][prompt, column])
                        best = max(best, (score, steps, column)) if best else (score, steps, column)
            assert best is not None
            for name in best_of.MEASURES:
                values[name].append(float(found[best[1]][name][prompt, best[2]]))
    way = best_of.served(found, STUDENT, "p35", candidates, cascade)
    assert way.steps == pytest.approx(calls / (5 * best_of.SEEDS))
    for name in best_of.MEASURES:
        assert way.values[name] == pytest.approx(np.reshape(values[name], (5, -1)).mean(axis=1))


def test_equal_cost_is_a_mixture_of_the_nearest_fixed_counts() -> None:
    found = drawn()
    way = best_of.mixed(found, 3.5)
    two, four = best_of.fixed(found, 2), best_of.fixed(found, 4)
    assert way.values["judge"] == pytest.approx(0.25 * two.values["judge"] + 0.75 * four.values["judge"])
    assert best_of.mixed(found, 8).values["judge"] == pytest.approx(best_of.fixed(found, 8).values["judge"])
