"""Each alarm is raised by its own sign and by nothing else."""

import math

import pytest

from training.alarms import alarms, all_alarms

QUIET = {
    "heldout_validation": 1.0,
    "reward_validation": 1.0,
    "diversity_validation": 3.0,
    "velocity_norm": 1.0,
    "saturation": 0.1,
}


def rows(**last: float) -> list[dict[str, float]]:
    """Three validations with a step between them, the last one changed."""
    return [{"step": -1, **QUIET}, {"step": 0, "loss": 1.0}, {"step": 1, **QUIET}, {"step": 3, **QUIET, **last}]


def test_a_quiet_run_and_a_run_that_has_just_begun_raise_nothing() -> None:
    assert alarms(rows(), 3.0) == [] and alarms(rows()[:1], 3.0) == [] and alarms([], math.inf) == []
    assert alarms(rows(heldout_validation=2.0, reward_validation=2.0), 3.0) == []


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ({"heldout_validation": 0.5, "reward_validation": 1.5}, "the held-out score fell by 0.500"),
        ({"diversity_validation": 2.4}, "diversity fell to 80%"),
        ({"reward_validation": 3.5, "heldout_validation": 3.5}, "above the teacher's 99.9th percentile"),
        ({"velocity_norm": 1.3}, "the velocity norm is 1.30 times"),
        ({"saturation": 0.25}, "25% of all pixel values are saturated"),
    ],
)
def test_each_sign_has_its_sentence(last: dict[str, float], sentence: str) -> None:
    found = alarms(rows(**last), 3.0)
    assert len(found) == 1 and sentence in found[0]


@pytest.mark.parametrize(
    ("quiet", "alarm"),
    [
        ({"diversity_validation": 2.71}, {"diversity_validation": 2.69}),
        ({"velocity_norm": 1.25}, {"velocity_norm": 1.26}),
        ({"saturation": 0.2}, {"saturation": 0.21}),
        ({"reward_validation": 3.0, "heldout_validation": 1.0}, {"reward_validation": 3.01, "heldout_validation": 1.0}),
        ({"reward_validation": 1.0, "heldout_validation": 0.9}, {"reward_validation": 1.01, "heldout_validation": 0.9}),
        ({"reward_validation": 1.5, "heldout_validation": 1.0}, {"reward_validation": 1.5, "heldout_validation": 0.99}),
    ],
)
def test_an_alarm_begins_at_its_bound(quiet: dict[str, float], alarm: dict[str, float]) -> None:
    """Nine tenths of the diversity, five quarters of the velocity, a tenth more of saturated values."""
    assert alarms(rows(**quiet), 3.0) == [] and len(alarms(rows(**alarm), 3.0)) == 1


def test_both_scores_falling_is_no_sign_of_hacking() -> None:
    assert alarms(rows(heldout_validation=0.5, reward_validation=0.5), 3.0) == []


def test_every_validation_keeps_its_own_alarms() -> None:
    log = [*rows(diversity_validation=2.4), {"step": 5, **QUIET}]
    assert [(at, text[:14]) for at, text in all_alarms(log, 3.0)] == [(4, "diversity fell")]


def test_scores_that_part_are_an_alarm_as_long_as_they_do() -> None:
    """Read from the last three validations: what happened before them is over."""
    heldout, trained = (2.0, 1.5, 1.0, 1.0, 1.0), (1.0, 1.5, 2.0, 2.0, 2.0)
    log = [
        {"step": k, **QUIET, "heldout_validation": h, "reward_validation": t}
        for k, (h, t) in enumerate(zip(heldout, trained, strict=True))
    ]
    assert [at for at, text in all_alarms(log, math.inf) if "held-out" in text] == [3, 4]
