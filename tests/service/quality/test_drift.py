"""The drift test against closed forms: what a bet is worth, what it may not be, and whose fault a drift is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from service.quality.drift import (
    CAP,
    EVERY,
    LOW_BETS,
    RANK_BETS,
    RECENT,
    Observation,
    Probes,
    Stream,
    cause,
    factors,
    observe,
    read_stream,
    step,
    stream_key,
    threshold,
)
from student.bundle import RewardReference
from student.probe import Outcome
from student.reference import distribution

# Four parts: below -1 (5 %), to 0 (45 %), to 1 (40 %), above (10 %).
COARSE = RewardReference(0.0, 1.0, {"0": -3.0, "5": -1.0, "50": 0.0, "90": 1.0, "100": 3.0}, count=10_000)
MIDDLES, SHARES = (0.025, 0.275, 0.7, 0.95), (0.05, 0.45, 0.4, 0.1)
STREAM = Stream("m", "2", 4, "64x64", "trained", False, 5000, 0.0, 0.05, evidence=1.5)


def test_a_rank_is_the_middle_of_its_part_and_a_job_is_one_observation() -> None:
    assert observe(COARSE, [-2.0]) == Observation(-2.0, 0.025, 1.0)
    assert observe(COARSE, [0.0]) == Observation(0.0, 0.7, 0.0)  # the percentile itself is above it
    assert observe(COARSE, [-9.0, -0.5, 0.5, 9.0]) == Observation(0.0, pytest.approx(sum(MIDDLES) / 4), 0.25)
    assert observe(RewardReference(0.0, 1.0, {}), [1.0]) is None


def test_without_drift_a_rank_has_the_mean_one_half_whatever_the_scores_look_like() -> None:
    assert math.fsum(m * s for m, s in zip(MIDDLES, SHARES, strict=True)) == pytest.approx(0.5)
    scores = np.random.default_rng(1).lognormal(0.0, 1.5, 200_000)
    reference = distribution(list(scores))
    seen = [observe(reference, [float(score)]) for score in scores[:20_000]]
    assert np.mean([one.rank for one in seen if one]) == pytest.approx(0.5, abs=0.006)
    assert np.mean([one.low for one in seen if one]) == pytest.approx(0.05, abs=0.004)


def test_a_bet_is_fair_at_its_margin_and_loses_inside_of_it() -> None:
    """Exactly: the expectation of each factor over the four parts, for a reference without an error and with one."""

    def expected(count: int | None) -> list[float]:
        reference = replace(COARSE, count=count)
        rows = [factors(reference, Observation(0.0, m, float(k == 0))) for k, m in enumerate(MIDDLES)]
        assert all(factor > 0 for row in rows for factor in row)
        return [math.fsum(s * row[b] for s, row in zip(SHARES, rows, strict=True)) for b in range(len(rows[0]))]

    assert expected(10**12) == pytest.approx([1.0] * len((*RANK_BETS, *LOW_BETS)), abs=1e-4)
    spread = math.sqrt(math.fsum(s * (m - 0.5) ** 2 for m, s in zip(MIDDLES, SHARES, strict=True)))
    margin, low_margin = 3 * spread / 10, 3 * math.sqrt(0.05 * 0.95 / 100)
    losses = [*(-abs(bet) * margin for bet in RANK_BETS), *(-bet * low_margin for bet in LOW_BETS)]
    assert expected(None) == pytest.approx([1 + loss for loss in losses])  # a hundred pictures, if nothing is said


def test_a_detector_is_a_shiryaev_roberts_sum() -> None:
    e = step(step(step([], [2.0, 0.5], 100.0), [3.0, 0.5], 100.0), [0.5, 2.0], 100.0)
    assert e == [((1 * 2 + 1) * 3 + 1) * 0.5, ((1 * 0.5 + 1) * 0.5 + 1) * 2.0]
    assert step([90.0], [3.0], 100.0) == [100.0]


def test_a_drift_of_every_kind_is_found_and_named() -> None:
    """By the detectors' own arithmetic on seeded scores; a stream that does not drift stays below the threshold."""
    gen = np.random.default_rng(7)
    reference = distribution(list(gen.normal(size=20_000)))
    limit = threshold(1)
    low = np.where(gen.random(20_000) < 0.1, gen.normal(-3, 0.1, 20_000), gen.normal(size=20_000) * 0.9 + 0.3)
    rows = {
        "": gen.normal(size=20_000), "lower": gen.normal(-0.3, 1, 20_000), "higher": gen.normal(0.3, 1, 20_000),
        "more low ones": low,
    }  # fmt: skip
    for direction, scores in rows.items():
        e: list[float] = []
        for count, score in enumerate(scores, 1):
            seen = observe(reference, [float(score)])
            assert seen is not None
            e = step(e, factors(reference, seen), CAP * limit)
            found = read_stream("m/1|4|64x64|s|raw", {"n": count, "mean": 0, "low": 0, "e": e, "limit": limit})
            if found.drifts:
                break
        assert (found.direction if found.drifts else "") == direction
        assert not direction or count < 2500


def test_the_threshold_counts_a_month_for_each_scorer() -> None:
    assert (threshold(1), threshold(2), threshold(0)) == (EVERY, 2 * EVERY, EVERY) and EVERY == 30 * 10_000


def test_a_stream_is_read_by_its_name() -> None:
    state = {"n": 3, "mean": 0.5, "low": 0.25, "e": [6.0, *[0.0] * 8], "limit": 2.0}
    found = read_stream(stream_key("m", "2", 4, "64x64", "trained", True), state)
    assert found == Stream("m", "2", 4, "64x64", "trained", True, 3, 0.5, 0.25, pytest.approx(1 / 3), "lower")
    assert read_stream("m/2|4|64x64|s|raw", {"n": 1, "mean": 0, "low": 0}).evidence == 0.0


@pytest.mark.parametrize(
    ("outcomes", "others", "reason"),
    [
        ({Outcome.SAME}, [], "prompts"),
        ({Outcome.SAME, Outcome.RECORDED}, [], "prompts"),
        ({Outcome.SAME, Outcome.PIXELS_CHANGED}, [], "engine"),  # one worker is enough
        ({Outcome.FAILED}, [], "engine"),
        ({Outcome.SCORES_CHANGED}, [], "scorer"),
        ({"waiting"}, [], "unknown"),
        (set(), [], "unknown"),
        ({Outcome.SAME}, [replace(STREAM, version="1", evidence=0.1)], "model"),
        ({Outcome.SAME}, [replace(STREAM, version="1", evidence=2.0)], "prompts"),
        ({Outcome.SAME}, [replace(STREAM, version="1", evidence=0.1, count=RECENT - 1)], "prompts"),
        ({Outcome.SAME}, [replace(STREAM, version="1", evidence=0.1, steps=2)], "prompts"),
        ({Outcome.SAME}, [replace(STREAM, evidence=0.1, scorer="heldout")], "prompts"),
    ],
)
def test_whose_fault_a_drift_is(outcomes: set[str], others: list[Stream], reason: str) -> None:
    assert cause(STREAM, Probes({"m/2": frozenset(outcomes)}), [STREAM, *others]) == reason
