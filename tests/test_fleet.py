"""The simulator against queueing theory, and against the real service at a rate that it was not measured at."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from pathlib import Path

import pytest

from benchmarks import fleet_batches
from benchmarks.fleet import cost, read, write
from benchmarks.fleet_check import Figures, Window, verdict
from benchmarks.fleet_load import Seen, Target, near, seen, times_of
from benchmarks.fleet_simulation import (
    Batches,
    Fleet,
    Spread,
    Times,
    dollars_per_million,
    fewest_workers,
    poisson,
    predict,
    replay,
)
from fewstep.answers import Answer
from fewstep.async_client import AsyncClient
from fewstep.load.report import percentile
from tests.service.support import running_service

DAY_S = 86400


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_worker_without_batches_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) calls."""
    call_s = 0.1
    found = predict(Times.steady({1: call_s}), rate=load / call_s, workers=1, count=60000)
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
    found = predict(Times.steady({1: d, 2: d}), rate=rate, workers=1, count=120000)
    assert found.mean_s == pytest.approx(expected, rel=0.03)


def test_settling_one_after_the_other_delays_the_later_ones() -> None:
    """Three jobs at once in one call of 1 s, settled in 0.1 s each, 0.01 s outside: by hand."""
    times = Times.steady({1: 1.0, 4: 1.0}, settle_s=0.1, outside_s=0.01)
    latencies, drawn = replay(times, [5.0, 5.5, 5.5, 5.5], workers=1)
    first = 1.1 + 0.01
    began = 6.1
    assert latencies == pytest.approx([first, *(began + 1.0 + 0.1 * k - 5.5 + 0.01 for k in (1, 2, 3))])
    assert drawn == pytest.approx(2.0)


def test_calls_are_filled_as_the_service_fills_them_or_as_is_asked() -> None:
    """A call takes 1 s for each of its images, which is known after eight were tried at once: then one by one."""
    times = Times.steady({size: float(size) for size in range(1, 9)})
    found, _ = replay(times, [0.0, *[0.5] * 8, *[8.5] * 3], 1)
    assert found == pytest.approx([1.0, *[8.5] * 8, 1.5, 2.5, 3.5])
    assert predict(times, 0.7, 1, 8000).p99_s < 0.75 * predict(times, 0.7, 1, 8000, batches=Batches(8)).p99_s
    fleet = Fleet(times, 1, batches=Batches(8, wait_s=0.5))
    fleet.run([1.0, 1.4])
    assert fleet.sizes == [2] and fleet.latencies_s[0] == pytest.approx(2.5)
    fleet = Fleet(times, 1, batches=Batches(2, wait_s=9.0))
    fleet.run([1.0, 1.9])
    assert fleet.sizes == [2] and fleet.latencies_s[0] == pytest.approx(2.9, abs=0.91), "full: nothing is waited for"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("load", [0.5, 0.9])
@pytest.mark.parametrize(("image_s", "claim_s"), [(0.01, 0.002), (0.001, 0.002), (0.01, 0.0)])
def test_the_rule_is_never_much_worse_than_taking_what_waits(
    image_s: float, claim_s: float, load: float, workers: int
) -> None:
    """Also where a call itself shares nothing, but a device waits between two of them."""
    times = fleet_batches.steady(0.0, image_s, claim_s)
    ours, theirs = (
        predict(times, load * times.capacity * workers, workers, 3000, batches=each) for each in (Batches(), Batches(8))
    )
    assert ours.mean_s < 1.1 * theirs.mean_s and ours.p99_s < 1.15 * theirs.p99_s


def test_policies_are_compared_in_calls_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight take 0.066 s, so that the capacity is 121 a second; one by one a worker draws 100."""
    monkeypatch.setattr(fleet_batches, "COUNT", 400)
    head, _, *rows = fleet_batches.batches(fleet_batches.steady(0.002, 0.008), workers=2).splitlines()
    assert head == "| share of the capacity | the rule | what waits, up to 8 | one image | up to 8, after 5 ms |"
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert list(cells) == ["50%", "70%", "90%"] and [row[2] for row in cells.values()].count("cannot keep up") == 1
    assert cells["90%"][2] == "cannot keep up" and cells["50%"][2].endswith("(1.0)")
    assert all(float(cell.split(",")[0]) > 1 for row in cells.values() for cell in row if "," in cell)


def test_what_comes_while_a_worker_claims_rides_with_it() -> None:
    times = Times(Spread({1: (1.0,), 4: (1.0,)}), claim_s=0.2)
    assert replay(times, [1.0, 1.1, 1.3], workers=1)[0] == pytest.approx([1.2, 1.1, 2.1])


def test_calls_that_vary_wait_as_pollaczek_and_khinchine_say() -> None:
    """M/G/1: the mean wait is rate E[S^2] / (2 (1 - load))."""
    calls, rate = (0.05, 0.05, 0.05, 0.25), 5.0
    load, square = rate * statistics.fmean(calls), statistics.fmean(call * call for call in calls)
    found = predict(Times(Spread({1: calls})), rate, workers=1, count=120000)
    assert found.mean_s == pytest.approx(statistics.fmean(calls) + rate * square / (2 * (1 - load)), rel=0.04)


def answered(rate: float, size: int, draw_s: float, queue_s: float = 0.002) -> Seen:
    """The first of its batch: settled in 3 ms; 10 ms outside."""
    return Seen(rate, 0.01 + queue_s + draw_s + 0.003, size, queue_s, draw_s, 0.003 * (size + 1) / 2, 0.01)


def test_service_times_are_read_from_answers() -> None:
    reported = Answer.model_validate({
        "id": "x", "created": 1, "model": "m", "model_version": "1", "runtime": "r", "batch_size": 2, "data": [],
        "timings": {"queue_s": 0.5, "inference_s": 0.2, "score_s": 0.1, "encode_s": 0.01, "total_s": 0.82},
    })  # fmt: skip
    one = seen(reported, 0.9)
    assert (one.size, one.queue_s, one.rate) == (2, 0.5, 0.0)
    assert (one.draw_s, one.after_s, one.outside_s) == pytest.approx((0.3, 0.02, 0.08))
    alone = [answered(0.0, 1, 0.1) for _ in range(5)]
    found = times_of([*alone, *(answered(9.0, 4, 0.2, queue_s=0.3) for _ in range(12))])
    assert found.calls.mean(1) == pytest.approx(0.1) and found.calls.mean(4) == pytest.approx(0.2)
    assert (found.claim_s, found.settle_s, found.outside.mean(4)) == pytest.approx((0.002, 0.003, 0.01))
    assert found.capacity == pytest.approx(4 / (0.002 + 0.2 + 4 * 0.003))


def test_the_loads_next_to_a_rate_are_those_that_count() -> None:
    loads = [answered(rate, 1, rate / 100) for rate in (0.0, 2.0, 2.1, 4.0, 8.0) for _ in range(5)]
    full = [answered(8.0, 4, 0.5) for _ in range(12)]
    assert {one.rate for one in near([*loads, *full], 3.0) if one.size == 1} == {2.0, 2.1, 4.0}
    assert {one.rate for one in near([*loads, *full], 1.0) if one.size == 1} == {0.0, 2.0, 2.1}
    assert {one.rate for one in near([*loads, *full], 9.0) if one.size == 1} == {8.0}
    assert [one for one in near([*loads, *full], 3.0) if one.size == 4] == full, "no other load has these calls"
    assert times_of([*loads, *full], rate=3.0).calls.mean(1) == pytest.approx((0.02 + 0.021 + 0.04) / 3)


def test_a_verdict_leaves_out_what_the_machine_did() -> None:
    def window(measured: float, drift: float) -> Window:
        is_, was = Figures(measured, measured, measured, 0.5), Figures(1.0, 1.0, 1.0, 0.5)
        return Window(100, was, was, is_, drift)

    assert verdict([window(1.1, 0.0), window(1.14, 0.1), window(3.0, 0.5)])[1] == 0
    assert verdict([window(1.2, 0.0), window(1.16, 0.1), window(0.9, 0.0)])[1] == 1
    assert verdict([window(1.0, 0.2), window(1.0, -0.2), window(1.0, 0.0)])[1] == 2


def test_times_survive_their_file(tmp_path: Path) -> None:
    times = Times(Spread({1: (0.1, 0.2), 8: (0.5,)}), 0.003, 0.002, Spread({1: (0.01, 0.03)}))
    write(times, tmp_path / "times.json")
    again = read(tmp_path / "times.json")
    assert (again.calls.mean(1), again.calls.mean(8), again.settle_s, again.claim_s, again.outside.mean(1)) == (
        pytest.approx((0.15, 0.5, 0.003, 0.002, 0.02))
    )


def test_the_table_in_the_docs_is_what_the_simulator_says() -> None:
    """Its rows of a million images; the others take minutes."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text("utf-8")
    reported = cost(0.03, 0.05, [1, 2, 4, 8], [1.5, 2.5, 4.0], p99_s=3.0, peak=2.0, millions=(1,)).splitlines()
    assert len(reported) == 6 and set(reported) <= set(text.splitlines())


def test_sizes_between_measured_ones_lie_on_the_line() -> None:
    times = Times.steady({2: 1.0, 4: 2.0}, settle_s=0.1)
    assert [times.calls.mean(size) for size in (1, 2, 3, 4)] == [1.0, 1.0, 1.5, 2.0]
    spread = Spread({2: (1.0, 2.0, 3.0, 4.0), 4: (3.0, 4.0, 5.0, 6.0)})
    assert [spread.at(3, share) for share in (0.0, 0.3, 0.6, 0.99)] == [2.0, 3.0, 4.0, 5.0]
    assert times.capacity == pytest.approx(max(2 / 1.2, 3 / 1.8, 4 / 2.4))


def test_the_fleet_is_the_smallest_that_keeps_the_objective() -> None:
    times = Times.steady({1: 0.2, 8: 0.6})
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
    """Measured with users that think, checked with open arrivals at more than one call at a time could do.

    Calls of half a second, so that what else this machine does in between weighs little.
    """

    async def both(url: str, moments: list[float]) -> tuple[Times, list[float]]:
        async with AsyncClient(url, connections=200) as client:
            target = Target(client, "fake:sleep=0.5 a red heart", workers=1)
            times = times_of(await target.measure(6.0), rate=len(moments) / moments[-1])
            return times, [one.took_s for one in await target.observe(moments, seed=1)]

    moments = poisson(random.Random(5).uniform(2.5, 4.0), 90, seed=11)
    with running_service(tmp_path / "data") as live:
        times, latencies = asyncio.run(both(live.url, moments))
    predicted, _ = replay(times, moments, workers=1)
    assert statistics.fmean(latencies) == pytest.approx(statistics.fmean(predicted), rel=0.15)
    assert percentile(latencies, 99) == pytest.approx(percentile(predicted, 99), rel=0.15)
