"""The simulator against queueing theory, and against the real service at a rate that it was not measured at."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from pathlib import Path

import pytest

from benchmarks.fleet import Times, dollars_per_million, fewest_workers, measure, observe, poisson, predict, replay
from fewstep.load import percentile
from tests.service.support import running_service

DAY_S = 86400


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_worker_without_batches_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) calls."""
    call_s = 0.1
    found = predict(Times({1: call_s}), rate=load / call_s, workers=1, count=60000)
    wait_s = call_s * load / (2 * (1 - load))
    assert found.mean_s == pytest.approx(call_s + wait_s, rel=0.04)
    assert found.busy == pytest.approx(load, rel=0.03) and found.batch == 1


def test_batches_of_two_wait_as_the_chain_of_their_calls_says() -> None:
    """One worker, constant calls of d, at most 2 in each, that takes what waits: an embedded Markov chain, solved.

    Q, the jobs left behind by a call, steps to max(Q - 2, 0) + A with A Poisson(rate d) (a job that arrives at an idle
    worker is alone in its call). Little's law turns the chain's mean queue into the mean time.
    """
    d, rate, largest, states = 1.0, 1.4, 2, 80
    arrive = [math.exp(-rate * d) * (rate * d) ** k / math.factorial(k) for k in range(states)]
    weight = [1.0] + [0.0] * (states - 1)
    for _ in range(4000):
        after = [0.0] * states
        for q, share in enumerate(weight):
            left = max(max(q, 1) - largest, 0)
            for k in range(states - left):
                after[left + k] += share * arrive[k]
        weight = [share / sum(after) for share in after]
    # Over a cycle (idle time if q = 0, then a call): the integral of the number waiting or being drawn.
    time_s = waiting = 0.0
    for q, share in enumerate(weight):
        time_s += share * ((1 / rate if q == 0 else 0.0) + d)
        waiting += share * (max(q, 1) * d + rate * d * d / 2)
    expected = waiting / time_s / rate
    found = predict(Times({1: d, 2: d}), rate=rate, workers=1, count=120000)
    assert found.mean_s == pytest.approx(expected, rel=0.03)


def test_settling_one_after_the_other_delays_the_later_ones() -> None:
    """Three jobs at once in one call of 1 s, settled in 0.1 s each, 0.01 s outside: by hand."""
    seen = replay(Times({1: 1.0, 4: 1.0}, settle_s=0.1, fixed_s=0.01), [5.0, 5.5, 5.5, 5.5], workers=1)
    first = 1.1 + 0.01
    began = 6.1
    assert seen == pytest.approx([first, *(began + 1.0 + 0.1 * k - 5.5 + 0.01 for k in (1, 2, 3))])


def test_sizes_between_measured_ones_lie_on_the_line() -> None:
    times = Times({2: 1.0, 4: 2.0}, settle_s=0.1)
    assert [times.call_s(size) for size in (1, 2, 3, 4)] == [1.0, 1.0, 1.5, 2.0]
    assert times.capacity == pytest.approx(max(2 / 1.2, 3 / 1.8, 4 / 2.4))


def test_the_fleet_is_the_smallest_that_keeps_the_objective() -> None:
    times = Times({1: 0.2, 8: 0.6})
    found = fewest_workers(times, rate=40.0, p99_s=1.0, count=8000)
    assert found.p99_s <= 1.0 < predict(times, 40.0, found.workers - 1, 8000).p99_s
    assert found.workers >= 40.0 / times.capacity
    with pytest.raises(ValueError, match="one call alone"):
        fewest_workers(times, rate=1.0, p99_s=0.1)
    assert dollars_per_million(2, 1e6, 2.5) == 120


def test_arrivals_are_poisson() -> None:
    moments = poisson(5.0, 20000, 3)
    gaps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.04)


def test_the_prediction_is_what_the_real_service_does(tmp_path: Path) -> None:
    """Measured in closed loops, checked with open arrivals at more than one call at a time could do: batches must form.

    Calls of half a second, so that what else this machine does in between weighs little.
    """
    prompt = "fake:sleep=0.5 a red heart"
    with running_service(tmp_path / "data") as live:
        times = asyncio.run(measure(live.url, None, prompt, 16))
        moments = poisson(random.Random(5).uniform(2.5, 4.0), 90, seed=11)
        predicted = replay(times, moments, workers=1)
        seen = asyncio.run(observe(live.url, None, prompt, moments))
    assert statistics.fmean(seen) == pytest.approx(statistics.fmean(predicted), rel=0.15)
    assert percentile(seen, 99) == pytest.approx(percentile(predicted, 99), rel=0.15)
